"""What runs Prefect tasks on Ray, imported after Ray itself; all other modules import it from here.

Where Ray is not imported yet, prefect-ray leaves a lazy module `ray` in `sys.modules`. `from ray.exceptions import ...`
would load Ray a second time, and Ray Tune would not know the error of a worker that died: the search would end.
"""

import ray
from prefect_ray import RayTaskRunner
from prefect_ray.context import remote_options

__all__ = ["RayTaskRunner", "remote_options"]

ray.__version__  # noqa: B018 - loads Ray now, if a lazy module stood there already
