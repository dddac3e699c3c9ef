from .base import Tool


class Restic(Tool):
    name = "restic"
