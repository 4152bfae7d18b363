import pytest

from broker.web.app import create_app


class Web:
    """The application over a test client, and who calls by name."""

    def __init__(self, house):
        self.house = house
        self.app = create_app(house.broker)
        self.client = self.app.test_client()

    def as_(self, name, **headers):
        return {"Authorization": f"Bearer {self.house.token(name)}", **headers}

    def get(self, path, by=None, **more):
        return self.client.get(path, headers=self.as_(by) if by else {}, **more)

    def post(self, path, by=None, json=None, headers=None, **more):
        headers = {**(self.as_(by) if by else {}), **(headers or {})}
        return self.client.post(path, headers=headers, json=json, **more)

    def form(self, path, headers=None, **parameters):
        return self.client.post(path, data=parameters, headers=headers or {})

    def assertion(self, name, **more):
        return {
            "client_assertion_type": "urn:ietf:params:oauth:client-assertion-type:jwt-bearer",
            "client_assertion": self.house.token(name),
            **more,
        }

    def open_task(self, *agents, by="pipeline", **more):
        body = {"purpose": "summarise the leads of May", "agents": agents or ["summarizer"], "deadline_s": 3600, **more}
        answer = self.post("/v1/tasks", by, json=body)
        assert answer.status_code == 201, answer.json
        return answer.json

    def grant(self, task, by="summarizer", **more):
        body = {"task_id": task["id"], "resource": "https://crm.example/api", "scopes": ["contacts:read"], **more}
        return self.post("/v1/grants", by, json=body)

    def introspect(self, token, by="crm-api"):
        return self.form("/oauth2/introspect", token=token, **self.assertion(by)).json


@pytest.fixture
def web(sqlite_house):
    return Web(sqlite_house)


@pytest.fixture
def web_on_both(house):
    return Web(house)
