"""Django: enqueue in a view; `python web_django.py runserver` serves it."""

import sys

from django.conf import settings
from django.core.management import execute_from_command_line
from django.http import Http404, HttpRequest, JsonResponse
from django.urls import path

from jobs import count_words
from omniq_sqlite import SQLiteBackend, TaskNotFoundError

settings.configure(ROOT_URLCONF=__name__, ALLOWED_HOSTS=["127.0.0.1", "testserver"])
backend = SQLiteBackend("jobs.db")  # one for the process, for all of its threads


def start_count(request: HttpRequest) -> JsonResponse:
    """Enqueue; the task is on disk when the client has its answer."""
    task_id = backend.enqueue(count_words.task(request.POST["text"]))
    return JsonResponse({"page": f"/counts/{task_id}"}, status=202)


def show_count(request: HttpRequest, task_id: str) -> JsonResponse:
    """Tell how the task ended, or that it has not."""
    try:
        result = backend.result(task_id, timeout=0)
    except TaskNotFoundError:
        raise Http404 from None
    except TimeoutError:
        return JsonResponse({"status": backend.status(task_id)})
    return JsonResponse({"status": result.status, "words": result.value})


urlpatterns = [path("counts", start_count), path("counts/<task_id>", show_count)]

if __name__ == "__main__":
    execute_from_command_line(sys.argv)
