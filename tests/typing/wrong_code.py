"""Mistakes that the type checker must find; each line that holds one ends in the code of the error."""

from fabric_core import Fabric
from fabric_core.precision import MixedPrecision

Fabric("cpu")  # error: call-arg
Fabric(device=1)  # error: call-arg
Fabric(devices=1.5)  # error: arg-type
Fabric().backward("loss")  # error: arg-type
Fabric().log("loss")  # error: call-arg
Fabric().save("model.ckpt", [1])  # error: arg-type
Fabric().global_rank = 3  # error: misc
Fabric().launch(3)  # error: arg-type
MixedPrecision("16")  # error: arg-type
