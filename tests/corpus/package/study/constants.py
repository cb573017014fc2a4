"""Numbers and words that the others use."""

RATE = 2
LIMIT: int = 100
SCALE = 1
HALF = 0.5
ZERO = 0.0
MASK = 0xFF
HUGE = 123456789012345678901234567890
TITLE = "Results"
MARK = b"ok"
WORDS = ("red", "green", "blue")
STOP = {"the", "a"}
WEIGHTS = {"red": 1, "green": 2}
UNUSED = 7
GREETING = "good " "day"
MIXED = ("s", "t", "u")
EMPTY = None
FLAG = True
