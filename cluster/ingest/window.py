"""How many tasks may be in flight: few at first, more while all goes well, half when memory is short or tasks die.

As TCP does it: until the first trouble each success adds a task, so the window doubles each time it has gone round; after
it, a whole round adds one. Tasks that were under way when the window shrank do not shrink it again.

Pending tasks are what an autoscaler adds nodes for, and the window grows past what the nodes of now can run.
"""

START = 2


class Window:
    """
    Args:
        most: Never more tasks than this.
    """

    def __init__(self, most: int):
        self.most = most
        self._size = float(min(START, most))
        self._calm = True
        self._round = 0

    @property
    def size(self) -> int:
        """Tasks that may be in flight now; at least 1."""
        return int(self._size)

    @property
    def round(self) -> int:
        """To be noted with a task when it starts, and given back when it has failed."""
        return self._round

    def succeeded(self) -> None:
        """A task has ended well."""
        self._size = min(self.most, self._size + (1 if self._calm else 1 / self._size))

    def shrink(self, started_in: int) -> None:
        """A task that was started in this round died, or said that memory is short."""
        if started_in < self._round:
            return
        self._round += 1
        self._calm = False
        self._size = max(1.0, self._size / 2)
