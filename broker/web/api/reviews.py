"""Reviews of what was opened by a break-glass, for those who had no part in it."""

from __future__ import annotations

from typing import Any

from broker.domain.identity import Caller
from broker.web import shapes
from broker.web.context import broker
from broker.web.operations import Operations, before, page

reviews = Operations("reviews")


@reviews("GET", "/v1/reviews", "Reviews, newest first", query_=shapes.ReviewQuery, answers={200: shapes.ReviewPage})
def list_reviews(caller: Caller, query: shapes.ReviewQuery) -> tuple[int, Any]:
    found = broker().reviews.page(
        caller,
        state=query.state,
        agent=query.agent,
        before=before(query.cursor, "rev"),
        limit=query.limit,
    )
    items = [case.review for case in found]
    return 200, page(items, [shapes.of_review(case) for case in found], query.limit)


@reviews("GET", "/v1/reviews/{id}", "One review: what was opened, who said yes", answers={200: shapes.ReviewAnswer})
def show_review(caller: Caller, review_id: str) -> tuple[int, Any]:
    return 200, shapes.of_review(broker().reviews.find(caller, review_id))


@reviews(
    "POST",
    "/v1/reviews/{id}/complete",
    "Say what the review found, once",
    body=shapes.CompleteReview,
    answers={200: shapes.ReviewAnswer},
    looks_again=True,
)
def complete_review(caller: Caller, review_id: str, body: shapes.CompleteReview) -> tuple[int, Any]:
    return 200, shapes.of_review(broker().reviews.complete(caller, review_id, body.note))
