"""Measures unisandbox against the bare tools on the same work: `python -m benchmarks`, or `make bench`.

`cases` says what is compared, `bare` and `spawner` run the bare tools, `measure` takes the times in turns, `phases`
says where the time goes, `report` and `plot` write the results. May know everything; nothing imports it.
"""
