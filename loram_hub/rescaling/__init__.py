"""One number for a recovered adapter, chosen on a development set: `recover_scaled`."""

from loram_hub.rescaling.rescaling import ScaledAdapter as ScaledAdapter
from loram_hub.rescaling.rescaling import recover_scaled as recover_scaled
from loram_hub.rescaling.rescaling import set_scale_ as set_scale_
from loram_hub.rescaling.search import ScaleSearch as ScaleSearch
