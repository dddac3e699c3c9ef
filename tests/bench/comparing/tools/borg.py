from .base import Tool


class Borg(Tool):
    name = "borg"
