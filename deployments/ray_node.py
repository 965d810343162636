"""`ray start` for a node that this machine alone can reach; takes the same options.

Where Ray supports clusters of several nodes it takes the machine's own address in place of 127.0.0.1, and a node that
has such an address listens on all interfaces. Where it does not, it stays on 127.0.0.1 and refuses to join a cluster.
Nodes that are all on this machine need the one without the other.
"""

from processes import HOST
from ray._private import ray_constants, services
from ray.scripts.scripts import start

if __name__ == "__main__":
    ray_constants.ENABLE_RAY_CLUSTER = True
    services.get_node_ip_address = lambda address=None: HOST
    start()
