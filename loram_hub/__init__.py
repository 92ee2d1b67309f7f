"""loram-hub: publish pruned models for LoRAM training, and recover the adapters trained on them to full size."""
