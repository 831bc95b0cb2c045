"""A hidden state as the OpenAI API has it."""

import base64

from torch import Tensor


def embedding(hidden: Tensor) -> str:
    """``[width]`` at unit length: base64 of little-endian fp32."""
    wide = hidden.float()
    unit = (wide / wide.norm()).cpu().numpy().astype("<f4")
    return base64.b64encode(unit.tobytes()).decode()
