"""KV caches in torch: the mixed one, one with room for what is written a token at a time, and recurrent layers'."""

from intactkv_export.torch_model.caches.latents import LatentLayout
from intactkv_export.torch_model.caches.mixed import Layout, MixedCache, MixedLayer, RoomyLayer
from intactkv_export.torch_model.caches.states import STATES, StateLayer, StateLayout

__all__ = ["STATES", "LatentLayout", "Layout", "MixedCache", "MixedLayer", "RoomyLayer", "StateLayer", "StateLayout"]
