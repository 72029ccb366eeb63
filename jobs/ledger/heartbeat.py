"""A thread that keeps the leases of this process, and notices when one is lost."""

import threading
from collections.abc import Callable
from datetime import datetime
from types import TracebackType

from rollsight.inspect.errors import UserError
from rollsight.jobs.ledger.claims import HEARTBEAT_S, LEASE_S, Lease, LeaseLostError, renew
from rollsight.jobs.ledger.database import Ledger


class Heartbeat:
    """Renews leases every `every_s` seconds while the block runs; `check` raises where one is lost.

    A database that is away for a while is no loss: the lease then runs on, and only a token that no longer
    fits says that another process took over.
    """

    def __init__(
        self,
        ledger: Ledger,
        clock: Callable[[], datetime],
        *leases: Lease,
        every_s: float = HEARTBEAT_S,
        lease_s: float = LEASE_S,
    ) -> None:
        self._ledger, self._clock, self._leases = ledger, clock, leases
        self._every_s, self._lease_s = every_s, lease_s
        self._lost: LeaseLostError | None = None
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    def check(self) -> None:
        """LeaseLostError where a lease was taken over: what is left to do is another's."""
        if self._lost is not None:
            raise self._lost

    def __enter__(self) -> "Heartbeat":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, fault: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end.set()
        self._thread.join()

    def _beat(self) -> None:
        while not self._end.wait(self._every_s):
            try:
                with self._ledger.write() as session:
                    for lease in self._leases:
                        renew(session, lease, self._clock(), self._lease_s)
            except LeaseLostError as lost:
                self._lost = lost
                return
            except UserError:
                continue  # busy or away: tried again at the next beat
