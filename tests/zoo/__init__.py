"""Tiny random models of every kind that is recognised, and the methods' plain-torch references on them.

The table says, by hand and independently of `pal_adapters`, where a block's sums are: nothing here imports the
package's own table. `by_hand` adds what a method does with hooks of its own, at other places than the package does.
`types/` builds the model types of transformers from their configs alone, and says what works on each.
"""

from tests.plain import attention as attention
from tests.plain import gelu as gelu
from tests.plain import layer_norm as layer_norm
from tests.plain import linear as linear
from tests.plain import low_rank as low_rank
from tests.plain import pal as pal
from tests.plain import top_attention as top_attention
from tests.plain import top_bert_layer as top_bert_layer

from .by_hand import BlockByHand as BlockByHand
from .by_hand import blocks_of as blocks_of
from .by_hand import by_hand as by_hand
from .by_hand import weights_of as weights_of
from .host import CACHE as CACHE
from .host import HOST_WARNINGS as HOST_WARNINGS
from .host import V5 as V5
from .host import Host as Host
from .host import Spec as Spec
from .host import Stack as Stack
from .host import difference as difference
from .host import outputs_of as outputs_of
from .host import randomise as randomise
from .host import resolve as resolve
from .table import ALBERT as ALBERT
from .table import BY_NAME as BY_NAME
from .table import CLIP_VISION as CLIP_VISION
from .table import HOSTS as HOSTS
