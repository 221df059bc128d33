"""KV caches in torch: the mixed one, one with room for what is written a token at a time, and recurrent layers'."""

from intactkv_export.torch_model.caches.latents import LatentLayout
from intactkv_export.torch_model.caches.mixed import Layout, MixedCache, MixedLayer, RoomyLayer, by_layer
from intactkv_export.torch_model.caches.state_layout import STATES, StateLayout
from intactkv_export.torch_model.caches.states import RowsAndStates, StateLayer, StatesCache

__all__ = [
    "STATES",
    "LatentLayout",
    "Layout",
    "MixedCache",
    "MixedLayer",
    "RoomyLayer",
    "RowsAndStates",
    "StateLayer",
    "StateLayout",
    "StatesCache",
    "by_layer",
]
