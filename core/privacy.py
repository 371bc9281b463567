"""Where the data of a request may go, from the strictest to the most open: this device, its site, anywhere."""

from typing import Literal

PrivacyClass = Literal["device", "site", "any"]
