"""Thread order: channels in the order in which a thread of the sm_90a main loop holds weights of one group of 32 only.

Of a block of 128 channels, four threads share a row: thread t multiplies the 32-bit words (four E4M3 codes) t, t + 4, t + 8, ... of the
block. In memory order these come from all four groups, so a thread needs the lookup tables of four exponents. In thread order word m of group g
lies at word 4 m + g instead of 8 g + m, and thread t holds group t. Sums over K do not depend on the order, as long as weights and
tokens share it.
"""

from torch import Tensor

_GROUPS, _WORDS = 4, 8  # of a block, and of a group


def to_thread_order(words: Tensor) -> Tensor:
    """Reorder [..., K/4], an element for every four channels, K a multiple of 128. A new tensor of the same shape."""
    return words.unflatten(-1, (-1, _GROUPS, _WORDS)).transpose(-1, -2).flatten(-3)


def from_thread_order(words: Tensor) -> Tensor:
    """The inverse of `to_thread_order`."""
    return words.unflatten(-1, (-1, _WORDS, _GROUPS)).transpose(-1, -2).flatten(-3)
