"""What goes wrong with a device."""


class BackendUnavailableError(RuntimeError):
    """A backend was asked for outright and this machine does not have what it needs."""


class DeviceError(RuntimeError):
    """A device failed, or went away, while it computed."""
