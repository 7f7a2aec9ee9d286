"""Results of initializations on disk: safetensors files, addressed by everything that determines them.

An entry is one file, `<cache>/weights/<key>.safetensors` (`entry.py`). It holds post-processed weights as they are and
predicted ones as the small blocks that they are tiled from, which makes it a third of the model's size and quicker to
read than the model is to fill with random numbers. It is written under another name and renamed, so that it is there
whole or not at all; everything in it is hashed, and one that does not match is a logged miss, never a wrong weight. A
lock beside it lets one of many processes compute while the others wait (`store.py`).

`<cache>/recipes/<recipe>.json` remembers the key that a call of `create_model` led to, so that the next one need not
record the model's graph to find its entry. `upkeep.py` lists, verifies and removes.
"""

from timm_ghn.storage.cache.entry import FORMAT, Entry
from timm_ghn.storage.cache.store import WeightCache, cache_key
from timm_ghn.storage.cache.upkeep import Damage, EntryInfo, Pruned

__all__ = ["FORMAT", "Damage", "Entry", "EntryInfo", "Pruned", "WeightCache", "cache_key"]
