"""The sandboxer that containerd and iSulad talk to: the Sandbox controller by gRPC, the task service by ttrpc.

Lives here: `config` (what may be set), `cri` (what a pod is asked to be), `pods` (pods as sandboxes of the engine),
`controller` and `tasks` (the two services), `bundles`, `stdio` and `terminals` (what a container comes with), `daemon`
(the process: sockets, signals, systemd). May know: the engine, wire, the contracts. Must not know: a backend.
It needs the extra `serve`, and runs on asyncio, since grpclib does.
"""
