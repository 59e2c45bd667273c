"""Index of an engine's unfinished jobs."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from lamella.engine.requests.completion import Completion, Job
from lamella.engine.requests.request import Request


class Jobs:
    """Unfinished jobs by id, and their completions by request, in order of arrival."""

    def __init__(self) -> None:
        self._jobs: dict[str, Job] = {}
        self._completions: dict[Request, tuple[Job, Completion]] = {}

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._jobs

    def __len__(self) -> int:
        return len(self._jobs)

    def __iter__(self) -> Iterator[tuple[Job, Completion]]:
        """Iterate over the unfinished completions, each with its job."""
        return iter(self._completions.values())

    def add(self, job: Job) -> None:
        """Add a job and its completions."""
        self._jobs[job.request_id] = job
        for completion in job.completions:
            self._completions[completion.request] = (job, completion)

    def find(self, request: Request) -> tuple[Job, Completion] | None:
        """Return the job and the completion of a request; None if it has ended."""
        return self._completions.get(request)

    def remove(self, request_id: str) -> Job | None:
        """Remove a job by id, and return it; None if there is none. The caller must `drop` its completions next."""
        return self._jobs.pop(request_id, None)

    def drop(self, completion: Completion) -> None:
        """Remove an ended completion, and its job if this was the last one."""
        job, _ = self._completions.pop(completion.request)
        if job.finished:
            self._jobs.pop(job.request_id, None)

    def roll_back(self) -> None:
        """Repair the index after an interrupted change: keep only complete jobs, and their unfinished completions."""
        for _, completion in self:
            completion.roll_back()
        self._jobs = {name: job for name, job in self._jobs.items() if not job.finished and self._is_complete(job)}
        for request, (job, completion) in list(self._completions.items()):
            if completion.finish_reason is not None or self._jobs.get(job.request_id) is not job:
                del self._completions[request]

    def requests(self, without: Collection[Job] = ()) -> list[Request]:
        """Return the requests of all jobs except those in `without`, in order of arrival."""
        return [completion.request for job, completion in self if job not in without]

    def _is_complete(self, job: Job) -> bool:
        """Return True if every completion of a job has ended or is in the index."""
        return all(each.finish_reason is not None or each.request in self._completions for each in job.completions)
