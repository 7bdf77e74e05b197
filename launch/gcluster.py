"""`gcluster job submit` of the Cluster Toolkit: the launcher for production on GKE, with a JobSet of its own."""

from launch.gke import GRACE_SECONDS, KEPT_SECONDS, Gke
from navil_jax.plan.cloud import is_named, shape_text

MOST_RESTARTS = 50  # what Google Cloud takes away counts as well
# gcluster fails a job on every exit status that it is not told: these are an exception, the watchdog and lost peers,
# and signals, such as SIGTERM, which training answers by saving, and SIGKILL. A mistake (2) is not among them.
RESTARTED = (1, 134, 135, 136, 137, 139, 143)


class Gcluster(Gke):
    """Needs gcluster and kubectl, on a cluster that is there; any generation and slices."""

    def submit(self) -> None:
        settings, command = self.settings, self.line()
        place = settings.place
        shape = [] if is_named(place) else [f"--topology={shape_text(place)}"]
        one_container = ["--gke-disable-parallel-containers"] if place.generation.name == "tpu7x" else []
        self.clear()
        self.shell.run(
            *("gcluster", "job", "submit", f"--project={settings.project}", f"--cluster={settings.cluster}"),
            *(f"--location={self.location}", f"--name={settings.name}"),
            *(f"--compute-type={settings.cloud.sized_name(place)}", f"--num-slices={settings.slices}"),
            *(f"--image={settings.image}", f"--restarts={MOST_RESTARTS}"),
            f"--restart-on-exit-codes={','.join(map(str, RESTARTED))}",
            *(f"--grace-period={GRACE_SECONDS}s", f"--gke-ttl-after-finished={KEPT_SECONDS}s"),
            *shape,
            *one_container,
            f"--command={command}",
        )
