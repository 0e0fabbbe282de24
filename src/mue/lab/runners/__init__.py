"""Many runs at once: processes and stacks that train them, and which layout of the two is fastest on this machine.

Here: what a runner is (``runner``), the one there is (``pool``, whose processes are ``worker`` with its ``jobs``), how it is chosen
(``open``, ``calibrate``), and a loop over it (``run_all``). Not here: how a run is trained (``mue.lab.train``), and which runs come next
(``mue.lab.sweep``).
"""
