"""How the arguments of ``Fabric(...)`` become a plan.

Order: merge arguments and environment (``request``) → plug-in objects (``objects``) → environment → accelerator →
devices → strategy → precision → final checks (``compatibility``). Each step is one function in one file; the result is
a frozen ``Plan``, and nothing touches a device before ``Plan.build()``.
"""
