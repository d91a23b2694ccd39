"""What engines have left on this host that nobody will clean away any more: found by its mark, removed when told to.

Everything that an engine makes carries its id. An engine lives as long as its state directory is locked, which its
keeper does; a link in the runtime directory leads from the id to that directory. What can be judged so, and whose
engine is gone, may be removed; on any doubt it is only listed. A directory of records that a user has chosen is never
touched: an engine that is opened on it takes over or cleans up what they describe.

`traces` finds, `verdicts` judges, `finding` lists what is left over, `removing` removes it. `freeing` does so under an
engine that lives, of whose things some have no record.
"""

from unisandbox.engine.leftovers.finding import Leftover, find
from unisandbox.engine.leftovers.freeing import free_unrecorded
from unisandbox.engine.leftovers.removing import remove

__all__ = ["Leftover", "find", "free_unrecorded", "remove"]
