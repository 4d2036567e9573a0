"""The code-execution service: SandboxFusion's HTTP shape and sessions in front of warm, isolated interpreters.

app.py            the application: routes, token, start and stop         (starts here)
service.py        each request: parse, admit, run, answer; a client that goes away ends its run
wire.py           what is on the wire
scoring.py        unit-test rewards: requests, comparison, and the client for environments
admission.py      how many runs at once, how many wait, whose turn it is, 429 after that
sessions.py       kernels by id: how many, how long, why one is gone
processes.py      several HTTP processes behind one port
pool.py           picks the tier, keeps the fork servers alive, runs the start-up self-test
fork_server.py    the service's end of one fork server: spawn, send a run, collect its output
kernel.py         the service's end of one session
languages.py      what is installed, how it is compiled and started
unsafe.py         the plain-subprocess backend behind ``allow_unsafe``
self_test.py      live canaries: refuse to start if any can be reached from inside
metrics.py        counters, phases, percentiles
inside/           what runs in the jail's process: namespaces, seccomp, Landlock, launchers, the fork loop, the kernel
                  (standard library only)
"""
