"""The code-execution service: SandboxFusion's HTTP shape in front of a warm, isolated fork server.

app.py            HTTP: parse, admit, answer                       (starts here)
admission.py      how many runs at once, how many wait, 429 after that
pool.py           picks the tier, keeps the fork servers alive, runs the start-up self-test
fork_server.py    the service's end of one fork server: spawn, send a run, collect its output
unsafe.py         the plain-subprocess backend behind ``allow_unsafe``
self_test.py      live canaries: refuse to start if any can be reached from inside
inside/           what runs in the jail's process: namespaces, seccomp, Landlock, the fork loop (standard library only)
"""
