"""Seccomp: which system calls a sandbox may make, as data, and compiled to the kernel's filter language.

May know: the kernel's system calls, libseccomp (through ctypes), the contracts' errors.
Must not know: OCI runtimes, sandboxes; who loads a filter, and when. `Profile.to_oci` speaks of a JSON format only.
"""

from unisandbox.host.seccomp.compile import compile_bpf, library_version
from unisandbox.host.seccomp.default import DEFAULT, INIT
from unisandbox.host.seccomp.profile import ArgumentTest, Profile, Rule

__all__ = ["DEFAULT", "INIT", "ArgumentTest", "Profile", "Rule", "compile_bpf", "library_version"]
