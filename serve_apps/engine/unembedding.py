"""The hidden state behind a row of logits, so that whatever computes logits can embed.

Logits are ``head @ hidden``, and a head has many more rows than columns: least squares gives back the one
hidden state there was, to within rounding. It costs one more product with the head per embedding, and the
head's Gram matrix once, at the first.
"""

import base64
from collections.abc import Iterator

import torch
from torch import Tensor

ROWS_AT_ONCE = 8192  # of the head, in fp32


class Unembedding:
    """One thread at a time may call it."""

    def __init__(self, head: Tensor, softcap: float | None = None) -> None:
        """``head`` is ``[vocabulary, width]``; ``softcap`` as in ``Decoder.head_softcap``."""
        self._head = head
        self._softcap = softcap
        self._factor: Tensor | None = None

    @torch.inference_mode()
    def hidden(self, logits: Tensor) -> Tensor:
        """``[width]`` in fp32, from ``[vocabulary]``."""
        if self._factor is None:
            width = self._head.shape[1]
            gram = torch.zeros(width, width, dtype=torch.float64, device=self._head.device)
            for rows in self._rows():
                gram += rows.T @ rows
            self._factor = torch.linalg.cholesky(gram)
        logits = logits.to(self._head.device).float()
        if self._softcap is not None:
            logits = self._softcap * torch.atanh(logits / self._softcap)
        parts = logits.split(ROWS_AT_ONCE)
        right = torch.zeros(self._head.shape[1], dtype=torch.float64, device=self._head.device)
        for rows, part in zip(self._rows(), parts, strict=True):
            right += rows.T @ part
        return torch.cholesky_solve(right.unsqueeze(1), self._factor).squeeze(1).float()

    def embedding(self, logits: Tensor) -> str:
        """The hidden state at unit length: base64 of little-endian fp32, as the OpenAI API has it."""
        hidden = self.hidden(logits)
        unit = (hidden / hidden.norm()).cpu().numpy().astype("<f4")
        return base64.b64encode(unit.tobytes()).decode()

    def _rows(self) -> Iterator[Tensor]:
        return (rows.float() for rows in self._head.split(ROWS_AT_ONCE))
