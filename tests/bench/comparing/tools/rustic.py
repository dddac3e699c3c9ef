from .base import Tool


class Rustic(Tool):
    name = "rustic"
