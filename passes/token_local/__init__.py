"""Is every node token-local? Decided on symbolic shapes, without weights and without running, after every pass.

A node is token-local if its result for one token depends on that token alone. `Watch` walks a graph and gives every
node a value (`values`): the meaning of each of its dimensions, in memory order. What a node does to them is looked up:
ATen ops in `aten` and `views`, token mixers and what only they may read in `mixers`, a user's own ops in `declared`.
Whatever is in none of these tables counts as mixing: better an error that names the op than a leak.
"""

from .declared import declare_token_local as declare_token_local
from .watch import Watch as Watch
