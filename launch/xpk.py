"""`xpk workload create`: the launcher for trials on GKE, with a JobSet of its own."""

from launch.gke import GRACE_SECONDS, KEPT_SECONDS, Gke

MOST_RESTARTS = 50  # what Google Cloud takes away counts as well
# xpk starts a job anew after 42 and 127 to 255, and after those that it is told: 1 is an exception, the watchdog or a
# lost peer. After 2, a mistake that no restart mends, it does not.
RESTARTED = 1


class Xpk(Gke):
    """Needs xpk and kubectl; any generation and slices."""

    def submit(self) -> None:
        settings, command = self.settings, self.line()
        self.clear()
        self.shell.run(
            *("xpk", "workload", "create", f"--cluster={settings.cluster}", *self.place),
            *(f"--workload={settings.name}", f"--tpu-type={settings.cloud.type_name(settings.place)}"),
            *(f"--num-slices={settings.slices}", f"--docker-image={settings.image}"),
            *(f"--max-restarts={MOST_RESTARTS}", f"--restart-on-exit-codes={RESTARTED}"),
            *(f"--termination-grace-period-seconds={GRACE_SECONDS}", f"--ttl-seconds-after-finished={KEPT_SECONDS}"),
            f"--command={command}",
        )
