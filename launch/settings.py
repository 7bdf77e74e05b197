"""The settings file: read, and checked as a whole before anything is started."""

import dataclasses
import re
import tomllib
from pathlib import Path
from typing import Any

from navil_jax.errors import UserError
from navil_jax.plan import cloud
from navil_jax.plan.topology import Slice, parse_topology

ROOT = Path(__file__).parents[1]
CAPACITIES = ("spot", "on-demand", "flex-start", "reservation", "calendar")
RESERVED = ("reservation", "calendar")
MOST_HOURS = 168  # of flex-start
_LABEL = r"[a-z](?:[a-z0-9-]*[a-z0-9])?"  # as Kubernetes and Compute Engine have names
_WHAT = "lower-case letters, digits and -, from a letter on"
_OWNER, _SHARED = r"projects/[a-z0-9.:-]+", "of another project projects/PROJECT"
# What a setting looks like: the pattern, its greatest length, and in words.
FORMS = {
    "project": (rf"(?:[a-z0-9.-]+:)?{_LABEL}", 63, f"a project's id ({_WHAT})"),
    "zone": (r"[a-z]+-[a-z]+\d+-[a-z0-9]+", 40, "a zone, such as us-east5-a"),
    "bucket": (
        r"gs://(?!.*\.\.|goog|(?:\d+\.){3}\d+(?:/|$))[a-z0-9][a-z0-9._-]{1,61}[a-z0-9](?:/[^/\s#?*\[\]]+)*",
        222,
        "an address such as gs://my-bucket (lower-case letters, digits, - _ and ., 3 to 63 of them; no goog at "
        "the beginning and no IP address)",
    ),
    "name": (_LABEL, 40, f"a name of at most 40 {_WHAT}"),
    "reservation": (
        rf"(?:{_OWNER}/reservations/)?{_LABEL}",
        160,
        f"a reservation's name, or {_SHARED}/reservations/NAME",
    ),
    "network": (
        rf"(?:{_OWNER}/global/networks/)?{_LABEL}",
        160,
        f"a network's name, or {_SHARED}/global/networks/NAME",
    ),
    "subnetwork": (
        rf"(?:{_OWNER}/regions/[a-z0-9-]+/subnetworks/)?{_LABEL}",
        160,
        f"a subnetwork's name, or {_SHARED}/regions/REGION/subnetworks/NAME",
    ),
    "service_account": (r"[a-z0-9-]+@[a-z0-9.-]+", 160, "an address such as tpu@my-project.iam.gserviceaccount.com"),
    "system_image": (_LABEL, 63, f"an image's name ({_WHAT})"),
    "cluster": (_LABEL, 40, f"a cluster's name of at most 40 {_WHAT}"),
    "cluster_location": (r"[a-z]+-[a-z]+\d+(?:-[a-z0-9]+)?", 40, "a region or zone, such as us-east5"),
    "image": (
        r"[a-z0-9.-]+(?::\d+)?(?:/[a-z0-9._-]+)+(?::\w[\w.-]*|@sha256:[0-9a-f]{64})",
        300,
        "a container with a tag or digest, such as us-docker.pkg.dev/my-project/images/navil:1",
    ),
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """What launch/settings.example.toml says of each; `file` is where they were read."""

    file: str = ""
    project: str = ""
    zone: str = ""
    bucket: str = ""
    name: str = ""
    topology: str = ""
    slices: int = 1
    capacity: str = ""
    reservation: str = ""
    hours: int = 0
    private: bool = False
    network: str = ""
    subnetwork: str = ""
    service_account: str = ""
    libtpu_init_args: str = ""
    system_image: str = ""
    cluster: str = ""
    cluster_location: str = ""
    image: str = ""

    @property
    def place(self) -> Slice:
        return parse_topology(self.topology, self.slices)

    @property
    def cloud(self) -> cloud.Cloud:
        return cloud.cloud_of(self.place.generation)

    @property
    def region(self) -> str:
        """Example: us-east5-a -> us-east5"""
        return self.zone.rpartition("-")[0]

    def reservation_in(self, where: str = "") -> str:
        """The reservation's address; `where` stands behind its project. Example: projects/p/reservations/r"""
        owner, name = (self.reservation.rpartition("/reservations/")[part] for part in (0, 2))
        return f"{owner or f'projects/{self.project}'}{where}/reservations/{name}"

    @property
    def workdir(self) -> str:
        return f"{self.bucket}/{self.name}"

    def error(self, key: str, message: str) -> UserError:
        return UserError(f"{self.file}: {key}: {message}")


def read_settings(file: Path, needed: tuple[str, ...]) -> Settings:
    """Reads and checks a settings file.

    Args:
      needed: settings that must be filled in.

    Raises:
      UserError: there is no such file, it is no TOML, or a setting is unknown, missing, of another type or wrong; all
        that are missing are named at once.
    """
    if not file.is_file():
        raise UserError(f"{file}: no such file; copy launch/settings.example.toml to launch/settings.toml, fill it in")
    try:
        given = tomllib.loads(file.read_text())
    except ValueError as error:  # also of bytes that are no text
        raise UserError(f"{file}: is no TOML: {error}") from error
    fields: dict[str, Any] = {field.name: field.type for field in dataclasses.fields(Settings) if field.name != "file"}
    for key, value in given.items():
        if key not in fields:
            raise UserError(f"{file}: {key}: there is no such setting; there are {', '.join(fields)}")
        if type(value) is not fields[key]:
            kinds = {str: "text in quotes", int: "a whole number", bool: "true or false"}
            raise UserError(f"{file}: {key}: must be {kinds[fields[key]]}, not {value!r}")
    settings = Settings(file=str(file), **given)
    if missing := [name for name in needed if not getattr(settings, name)]:
        raise UserError(f"{file}: not filled in: {', '.join(missing)}")
    _check(settings)
    return settings


def _check(settings: Settings) -> None:
    for key, (pattern, most, what) in FORMS.items():
        value = getattr(settings, key)
        if value and (len(value) > most or not re.fullmatch(pattern, value)):
            raise settings.error(key, f"{value!r} is not {what}")
    if settings.slices < 1:
        raise settings.error("slices", f"{settings.slices} is not a number from 1")
    if settings.image.endswith(":latest"):
        raise settings.error("image", "the tag latest is other code tomorrow; give every image a tag of its own")
    _check_capacity(settings)
    if settings.topology:
        _check_slice(settings)


def _check_capacity(settings: Settings) -> None:
    capacity = settings.capacity
    if capacity and capacity not in CAPACITIES:
        raise settings.error("capacity", f"{capacity!r} is none of {', '.join(CAPACITIES)}")
    if capacity in RESERVED and not settings.reservation:
        raise settings.error("reservation", f'is empty; capacity = "{capacity}" needs its name')
    if settings.reservation and capacity not in RESERVED:
        raise settings.error("reservation", f'is not used with capacity = "{capacity}"; empty it, or change capacity')
    if capacity == "flex-start" and not 0 < settings.hours <= MOST_HOURS:
        raise settings.error("hours", f"{settings.hours} is not from 1 to {MOST_HOURS}, which flex-start gives")
    if settings.hours and capacity != "flex-start":
        raise settings.error("hours", f'is not used with capacity = "{capacity}"; set it to 0, or change capacity')
    if settings.subnetwork and not settings.network:
        raise settings.error("network", "is empty; a subnetwork needs its network")


def _check_slice(settings: Settings) -> None:
    """The slice, whether its generation is in the zone, and the compiler's flags."""
    if re.match(r"\d+x", settings.topology):
        raise settings.error("topology", f"{settings.topology!r} says how many slices; use the setting slices for that")
    key = "topology"
    try:
        cloud.check_slice(settings.place)
        if settings.zone:
            key = "zone"
            cloud.check_zone(settings.place.generation, settings.zone)
        key = "libtpu_init_args"
        cloud.libtpu_init_args(settings.libtpu_init_args, settings.place)
    except UserError as error:
        raise settings.error(key, str(error).removeprefix("--topology: ")) from error
