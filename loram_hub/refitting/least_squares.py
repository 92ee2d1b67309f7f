"""Ridge least squares of one matrix, from activations that arrive batch by batch.

With the matrix W (O, K), its inputs X (M, K) and what its outputs fall short of, R (M, O), the correction is

    D = argmin |X D^T - R|^2 + lambda |D|^2  =  (R^T X) (X^T X + lambda I)^-1,    lambda = ridge * trace(X^T X) / K

so a large ridge leaves W as it is, and the error on these inputs never grows. With R = X_full W_full^T - X W^T and
lambda -> 0, W + D is the refit W_full H[:, kept] (H[kept, kept])^-1 of Tyr-the-Pruner, H = X_full^T X_full.

Sums and the solution are in fp64: normal equations square the condition number, and fp32 sums would leave errors of the
size of a small ridge. That is (2 K + O) K x 8 bytes: 0.6 GB for down_proj of a 70B model at a ratio of 0.85.

Shapes in this file: M tokens, K kept columns, O rows.
"""

from __future__ import annotations

import torch

from loram_hub.errors import InvalidRequestError, VerificationError


class ColumnFit:
    """The normal equations of one matrix."""

    def __init__(self, name: str, weight_OK: torch.Tensor) -> None:
        """Start with no activations.

        Args:
            name: of the matrix, for errors.
            weight_OK: the matrix as it is, on the device where it is multiplied.
        """
        self._name = name
        self._weight_OK = weight_OK
        rows, columns = weight_OK.shape
        # Apple's GPUs have no fp64.
        device = torch.device("cpu") if weight_OK.device.type == "mps" else weight_OK.device
        self._gram_KK = torch.zeros(columns, columns, dtype=torch.float64, device=device)
        self._short_OK = torch.zeros(rows, columns, dtype=torch.float64, device=device)

    def add(self, inputs: torch.Tensor, short_of: torch.Tensor) -> None:
        """Take in a batch.

        Args:
            inputs: (..., K), what the matrix is multiplied with.
            short_of: (..., O), what is to be added to its output.
        """
        inputs_MK = inputs.flatten(0, -2).to(self._gram_KK)
        short_MO = short_of.flatten(0, -2).to(self._gram_KK)
        self._gram_KK.addmm_(inputs_MK.T, inputs_MK)
        self._short_OK.addmm_(short_MO.T, inputs_MK)

    def solve(self, ridge: float, dtype: torch.dtype) -> torch.Tensor:
        """Solve for the matrix; uses the sums up.

        Args:
            ridge: share of the mean diagonal.
            dtype: the release stores it in; the result is rounded to it.

        Raises:
            InvalidRequestError: without a ridge the inputs do not determine the columns.
            VerificationError: an activation or the result is not finite.
        """
        diagonal = self._gram_KK.diagonal()
        mean = float(diagonal.mean())
        if mean == 0:  # inputs that are all zero ask for nothing
            return self._weight_OK.to(dtype)
        if not bool(self._gram_KK.isfinite().all() and self._short_OK.isfinite().all()):
            raise VerificationError(
                f"Activations at {self._name} are not finite. Are base and release sound? loram verify looks at both."
            )
        diagonal.add_(ridge * mean)
        largest = float(diagonal.max())
        factor_KK, failed = torch.linalg.cholesky_ex(self._gram_KK)
        least = float(factor_KK.diagonal().min()) ** 2
        if int(failed) or least < len(diagonal) * torch.finfo(torch.float64).eps * largest:
            raise InvalidRequestError(
                f"The calibration does not determine the {len(diagonal):,} columns of {self._name} with a ridge of "
                f"{ridge}. Give more calibration, or set a larger ridge; 0.05 is the default."
            )
        correction_OK = torch.cholesky_solve(self._short_OK.T, factor_KK).T
        solved_OK = (self._weight_OK.to(correction_OK) + correction_OK).to(dtype)
        if not bool(solved_OK.isfinite().all()):
            raise VerificationError(f"The refit of {self._name} is not finite in {dtype}. Give a larger ridge.")
        return solved_OK
