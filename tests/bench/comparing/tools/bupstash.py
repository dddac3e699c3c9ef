from .base import Tool


class Bupstash(Tool):
    name = "bupstash"
