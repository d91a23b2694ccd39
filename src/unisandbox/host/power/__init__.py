"""What this process may do here, and what gives it the rest: the one place that says so.

`standing`: what it is and has. `ids`: which ids it may have in a user namespace. `obstacles`: what keeps it from
namespaces and mounts, `trial`: as far as that takes a process of its own. `remedies`: what gives it these, in words.
Everything is looked at without a change to anything. Knows Linux and the engines that make containers, and nothing of
sandboxes. Standard library only, but for `trial`.
"""
