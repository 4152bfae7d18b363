"""The logins that a real PostgreSQL has: which are ours, and how they end."""

import contextlib
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import psycopg
import pytest
import sqlalchemy as sa
from psycopg.sql import SQL, Identifier, Literal

from broker.domain.clock import system_clock
from broker.domain.errors import Invalid, ProviderRefused, ProviderUnavailable
from broker.domain.identity import new_id
from broker.providers.base import SecretRequest
from broker.providers.targets import Login, PostgresLogins, Target, grant_of, target_url
from broker.providers.vault import SecretSource, VaultAuth, VaultProvider, VaultSettings
from broker.providers.vault.administration import VaultSetup, brokered
from broker.providers.vault.setup import ENDING, DatabaseRole
from tests.conftest import postgres_database
from tests.openbao import DATABASE, SOURCES, connect

ROLE = DatabaseRole(
    source=SecretSource.parse({"engine": "database", "role": "desk"}),
    connection="desk",
    member_of="desk_ro",
    heir="desk_heir",
)
ADMINISTRATOR = "desk_admin"
PASSWORD = "hunter2/@:%"
ENCODED = "hunter2%2F%40%3A%25"
UNTIL = datetime(2030, 1, 2, 3, 4, 5, tzinfo=UTC)


class Desk:
    """A database as `broker vault setup` has it prepared, with the users that Vault would make."""

    def __init__(self, server, url, directory):
        self._server, self._url, self._directory = server, url, directory
        self.database = sa.make_url(url).database

    def superuser(self, database=None):
        return psycopg.connect(self._dsn(self._server.username, database), autocommit=True)

    def _dsn(self, user, database=None):
        return f"host={self._server.query['host']} dbname={database or self.database} user={user}"

    def make(self, name=None, *, until=UNTIL):
        """A user as the creation statement makes it, by the user of Vault."""
        name = name or f"jit-{new_id('grt', system_clock()).replace('_', '-')}-sbA3ajOTUIK8"
        statement = ROLE.creation_statement
        for place, value in (("name", name.replace('"', '""')), ("password", "secret"), ("expiration", until)):
            statement = statement.replace(f"{{{{{place}}}}}", str(value))
        with psycopg.connect(self._dsn(ADMINISTRATOR), autocommit=True) as db:
            db.execute(statement)
        return name

    def session(self, name, database=None):
        return psycopg.connect(self._dsn(name, database), autocommit=True)

    def exists(self, name):
        with self.superuser() as db:
            return db.execute("SELECT count(*) FROM pg_roles WHERE rolname = %s", (name,)).fetchone()[0] == 1

    def target(self, *, host=None, user=ROLE.maintenance, heir="desk_heir", database=None):
        file = self._directory / "url"
        place = f"?host={self._server.query['host']}" if host is None else ""
        file.write_text(f"postgresql://{user}:{ENCODED}@{host or ''}/{database or self.database}{place}\n")
        return Target(name="desk", url_file=file, heir=heir)

    def logins(self, **changed):
        return PostgresLogins(self.target(**changed))

    def find(self, name):
        return {login.name: login for login in self.logins().list_logins()}.get(name)


@pytest.fixture
def desk(postgres, tmp_path):
    with postgres_database(postgres) as url:
        made = Desk(postgres, url, tmp_path)
        with made.superuser() as db:
            db.execute(ROLE.target_sql(administrator=ADMINISTRATOR))
            db.execute(ROLE.maintenance_sql(administrator=ADMINISTRATOR))
            db.execute(SQL("ALTER ROLE desk_ro_maintenance PASSWORD {}").format(Literal(PASSWORD)))
            db.execute("GRANT CREATE ON SCHEMA public TO desk_ro")
        before = {name for name in roles(made) if not name.startswith("desk_")}
        yield made
        with made.superuser() as db:
            db.execute("REASSIGN OWNED BY desk_heir TO CURRENT_USER")
            for name in sorted(roles(made) - before, reverse=True):
                db.execute(SQL("DROP OWNED BY {0} CASCADE; DROP ROLE {0}").format(Identifier(name)))


def roles(desk):
    with desk.superuser() as db:
        return {name for (name,) in db.execute("SELECT rolname FROM pg_roles WHERE rolname !~ '^pg_'")}


def is_cut(session):
    try:
        session.execute("SELECT 1")
    except psycopg.OperationalError:
        return True
    return False


# --- what is ours ----------------------------------------------------------------------------------------------------


def test_a_login_says_for_which_grant_until_when_and_how_many_have_it_open(desk):
    grant_id = new_id("grt", system_clock())
    name = desk.make(f"jit-{grant_id.replace('_', '-')}-sbA3ajOTUIK8")
    with desk.session(name), desk.session(name):
        assert desk.find(name) == Login(name=name, grant_id=grant_id, valid_until=UNTIL, sessions=2)
    assert grant_of(name) == grant_id


@pytest.mark.parametrize(
    ("until", "valid_until"),
    [
        ("infinity", None),
        ("-infinity", datetime(1970, 1, 1, tzinfo=UTC)),
        ("0044-03-15 BC", datetime(1970, 1, 1, tzinfo=UTC)),
        ("12026-01-01", None),
        ("2030-01-02 03:04:05.678+02", datetime(2030, 1, 2, 1, 4, 5, tzinfo=UTC)),
    ],
)
def test_a_login_whose_end_no_calendar_has_is_still_found(desk, until, valid_until):
    name = desk.make(until=until)
    assert desk.find(name).valid_until == valid_until


ID = "01m86tg4a0e00800476mt57fq0"
NOT_OURS = [
    "grt_" + ID,
    f"jit-grt-{ID}",
    f"jit-grt-{ID}-",
    f"jit-grt-{ID}-sbA3ajOTUIK",
    f"jit-grt-{ID}-sbA3ajOTUIK8x",
    f"jit-grt-{ID}-sbA3ajOTUIK8-",
    f"jit-grt-{ID}-sbA3ajOTUIK8\n",
    f"\njit-grt-{ID}-sbA3ajOTUIK8",
    f" jit-grt-{ID}-sbA3ajOTUIK8",
    f"xjit-grt-{ID}-sbA3ajOTUIK8",
    f"x\njit-grt-{ID}-sbA3ajOTUIK8",
    f"jit-grt-{ID}-sbA3ajOTUIK8\nx",
    f"jit-grt_{ID}-sbA3ajOTUIK8",
    f"jit-grt-{ID.upper()}-sbA3ajOTUIK8",
    f"JIT-GRT-{ID}-sbA3ajOTUIK8",
    f"jit-task-{ID}-sbA3ajOTUIK8",
    f"jit-grt-{ID[:-1]}-sbA3ajOTUIK8",
    f"jit-grt-8{ID[1:]}-sbA3ajOTUIK8",  # more than 128 bits
    f"jit-grt-{ID[:-1]}i-sbA3ajOTUIK8",  # no letter of the alphabet
    f"jit-grt-{ID}-sbA3ajOTUIK\u00e9",
    f"jit-grt-{ID}-sbA3ajOTUI\u212a8",  # the sign of the kelvin, which is a "k" to whoever ignores case
    f"jit-grt-{ID[:-1]}\u0660-sbA3ajOTUIK8",  # a digit of another script
    f'jit-grt-{ID}-"sbA3ajOTUI"',
    f"jit-grt-{ID}-sbA3aj';--",
    f"jit-grt-{ID}-sbA3a$$;--",
    'postgres"; DROP ROLE desk_ro; --',
    "desk",
]


@pytest.mark.parametrize("name", NOT_OURS, ids=ascii)
def test_a_login_that_only_resembles_ours_is_neither_listed_nor_ended(desk, name):
    desk.make(name)
    assert grant_of(name) is None
    assert desk.find(name) is None
    login = Login(name=name, grant_id=f"grt_{ID}", valid_until=None, sessions=0)
    with pytest.raises(ValueError, match="not the name of a login that was made for this grant"):
        desk.logins().end(login)
    assert desk.exists(name)


def test_a_login_of_another_grant_than_is_meant_is_not_ended(desk):
    name = desk.make()
    other = Login(name=name, grant_id=f"grt_{ID}", valid_until=None, sessions=0)
    with pytest.raises(ValueError, match="not the name of a login that was made for this grant"):
        desk.logins().end(other)
    assert desk.exists(name)


# --- its end ---------------------------------------------------------------------------------------------------------


def test_an_open_session_is_cut_and_no_role_is_left(desk):
    name, other = desk.make(), desk.make()
    with desk.session(name) as session, desk.session(other) as spared:
        desk.logins().end(desk.find(name))
        assert is_cut(session)
        assert not is_cut(spared)
        with pytest.raises(psycopg.OperationalError):
            desk.session(name)
    assert (desk.exists(name), desk.exists(other)) == (False, True)
    assert desk.find(name) is None


def test_ending_one_that_is_gone_already_is_success(desk):
    name = desk.make()
    login = desk.find(name)
    desk.logins().end(login)
    desk.logins().end(login)


def test_what_it_made_goes_to_its_heir(desk):
    name = desk.make()
    with desk.session(name) as session:
        session.execute("CREATE TABLE notes (id int)")
        session.execute("GRANT SELECT ON notes TO PUBLIC")
    desk.logins().end(desk.find(name))
    with desk.superuser() as db:
        assert db.execute("SELECT tableowner FROM pg_tables WHERE tablename = 'notes'").fetchone() == ("desk_heir",)


def test_one_that_cannot_be_dropped_yet_may_not_log_in_and_is_found_again(desk):
    """It owns something in another database, which no session in this one can give away."""
    name = desk.make()
    with desk.superuser() as db:
        db.execute("CREATE DATABASE desk_elsewhere")
    try:
        with desk.superuser("desk_elsewhere") as db:
            db.execute(SQL("CREATE SCHEMA theirs AUTHORIZATION {}").format(Identifier(name)))
        with desk.session(name) as session:
            with pytest.raises(ProviderRefused) as refused:
                desk.logins().end(desk.find(name))
            assert is_cut(session)
        assert "2BP01" in refused.value.reason
        with pytest.raises(psycopg.OperationalError, match="not permitted to log in"):
            desk.session(name)
        assert desk.find(name) is not None
    finally:
        with desk.superuser() as db:
            db.execute("DROP DATABASE desk_elsewhere WITH (FORCE)")
    desk.logins().end(desk.find(name))
    assert not desk.exists(name)


def test_an_heir_that_is_not_there_is_told_and_the_login_refused_meanwhile(desk):
    name = desk.make()
    with pytest.raises(ProviderRefused, match="the database desk refused to end a login") as refused:
        desk.logins(heir="nobody").end(desk.find(name))
    assert 'role "nobody" does not exist' in refused.value.reason
    with pytest.raises(psycopg.OperationalError, match="not permitted to log in"):
        desk.session(name)


def test_a_session_that_does_not_end_is_no_confirmation(desk):
    """INV-04: what cannot be seen to be gone is not."""
    name = desk.make()
    logins = desk.logins()
    with desk.session(name), desk.superuser() as db:
        # Nobody is told to end, as if each were busy with what it does not interrupt.
        db.execute("CREATE SCHEMA hidden")
        db.execute("CREATE FUNCTION hidden.nothing(int) RETURNS bool LANGUAGE sql AS 'SELECT true'")
        statements = [text.replace("pg_catalog.pg_terminate_backend", "hidden.nothing") for text in ENDING]
        db.execute("GRANT USAGE ON SCHEMA hidden TO PUBLIC")
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr("broker.providers.targets.ENDING", statements)
            with pytest.raises(ProviderUnavailable, match="did not confirm") as unconfirmed:
                logins.end(desk.find(name))
    assert "0 roles and 1 sessions are left" in unconfirmed.value.reason


def test_many_ask_for_the_end_of_one(desk):
    """As Vault may, whose queue works on what we just found."""
    for _ in range(5):
        login, logins = desk.find(desk.make()), desk.logins()
        with desk.session(login.name), ThreadPoolExecutor(4) as pool:
            ended = [pool.submit(logins.end, login) for _ in range(4)]
        problems = [problem for each in ended if (problem := each.exception()) is not None]
        # Whoever comes second may be told that it was changed meanwhile; nobody is told that it cannot be.
        assert all(isinstance(problem, ProviderUnavailable) for problem in problems)
        assert not desk.exists(login.name)


def test_one_that_somebody_else_dropped_meanwhile_is_gone(desk, monkeypatch):
    login = desk.find(desk.make())
    dropped = SQL("DROP ROLE {}").format(Identifier(login.name)).as_string()
    monkeypatch.setattr("broker.providers.targets.ENDING", [dropped, "COMMIT AND CHAIN", dropped])
    desk.logins().end(login)
    assert not desk.exists(login.name)


# --- who may ---------------------------------------------------------------------------------------------------------


def test_the_maintenance_login_acts_for_vault_s_own_user_and_for_nobody_else(desk):
    """What it may end are the users that this one made: another's are refused, as is everything else."""
    with desk.superuser() as db:
        name = f"jit-grt-{ID}-sbA3ajOTUIK8"
        db.execute(SQL("CREATE ROLE {} LOGIN").format(Identifier(name)))
    with pytest.raises(ProviderRefused) as refused:
        desk.logins().end(desk.find(name))
    assert refused.value.reason.startswith("42501: permission denied")
    assert desk.exists(name)
    with psycopg.connect(desk._dsn(ROLE.maintenance), autocommit=True) as db:
        assert db.execute("SELECT current_user, session_user").fetchone() == (ADMINISTRATOR, ROLE.maintenance)
        for statement in (f"ALTER ROLE {ADMINISTRATOR} SUPERUSER", "DROP ROLE desk_heir", "CREATE DATABASE more"):
            with pytest.raises(psycopg.errors.InsufficientPrivilege):
                db.execute(statement)


def test_the_set_up_prints_the_maintenance_login_where_a_resource_names_a_target(tmp_path):
    def printed(**more):
        (resource,) = brokered([("urn:db:desk", {"engine": "database", "role": "desk_ro", **more}, 600)])
        auth = VaultAuth(method="token_file", token_file=str(tmp_path / "token"))
        settings = VaultSettings(address="https://vault.example", auth=auth, lease_prefix_exclusive=True)
        setup = VaultSetup(settings=settings, resources=(resource,), clock=system_clock)
        url = f"postgresql://{ADMINISTRATOR}@db.example/desk"
        return setup.database_target(url, resource=None, member_of=None, heir=None, connection=None).sql

    sql = printed(target="desk")
    assert ROLE.maintenance_sql(administrator=ADMINISTRATOR) in sql
    assert "-- \\password desk_ro_maintenance\n" in sql
    assert printed() == sql.partition("-- The login through which the broker looks")[0]


def test_a_name_that_is_no_name_is_refused_before_it_is_sql():
    with pytest.raises(Invalid, match="administrator must be"):
        ROLE.maintenance_sql(administrator="x; --")
    with pytest.raises(Invalid, match="member_of is too long"):
        replace(ROLE, member_of="d" * 60).maintenance_sql(administrator=ADMINISTRATOR)
    with pytest.raises(Invalid, match="heir must be"):
        Target(name="desk", url_file="url", heir='x" --')


# --- what the other side does ----------------------------------------------------------------------------------------


@pytest.fixture
def passwords(desk):
    """The maintenance login has to give its password."""
    with desk.superuser() as db:
        (file,) = db.execute("SHOW hba_file").fetchone()
        with open(file) as hba:
            before = hba.read()
        try:
            with open(file, "w") as hba:
                hba.write(f"local {desk.database} {ROLE.maintenance} scram-sha-256\n{before}")
            db.execute("SELECT pg_reload_conf()")
            yield
        finally:
            with open(file, "w") as hba:
                hba.write(before)
            db.execute("SELECT pg_reload_conf()")


def failure(call):
    with pytest.raises((ProviderRefused, ProviderUnavailable)) as raised:
        call()
    # Nothing that is logged with it may hold what the connection was made with (INV-30).
    assert raised.value.__cause__ is raised.value.__context__ is None
    assert "hunter2" not in f"{raised.value} {raised.value.reason}"
    return raised.value


def test_the_password_of_the_file_opens_it_and_another_one_does_not(desk, passwords):
    logins = desk.logins()
    assert logins.list_logins() == ()
    file = desk._directory / "url"
    good = file.read_text()
    file.write_text(good.replace("hunter2", "hunter2wrong"))
    problem = failure(logins.list_logins)
    assert isinstance(problem, ProviderUnavailable)
    assert "password authentication failed" in problem.reason
    # It is read again each time, so that a new one needs no new start.
    file.write_text(good)
    assert logins.list_logins() == ()


def test_a_server_that_is_down_is_unavailable(desk):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    login = desk.find(desk.make())
    logins = desk.logins(host=f"127.0.0.1:{port}")
    for call in (logins.list_logins, lambda: logins.end(login)):
        assert isinstance(failure(call), ProviderUnavailable)
    assert desk.exists(login.name)


def test_a_database_that_is_not_there_is_unavailable(desk):
    assert "does not exist" in failure(desk.logins(database="absent").list_logins).reason


def test_a_server_that_says_nothing_is_left_at_the_deadline(desk):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        target = desk.target(host=f"127.0.0.1:{silent.getsockname()[1]}")
        problem = failure(PostgresLogins(target, deadline=timedelta(seconds=1)).list_logins)
    assert isinstance(problem, ProviderUnavailable)
    assert "timeout" in problem.reason


def test_a_server_that_falls_silent_after_the_login_is_left_at_the_deadline(desk):
    with Falters(desk) as address:
        problem = failure(PostgresLogins(desk.target(host=address), deadline=timedelta(seconds=1)).list_logins)
    assert isinstance(problem, ProviderUnavailable)
    assert problem.reason == "it did not answer within 1 s"


def test_a_login_that_somebody_holds_is_left_at_the_deadline(desk):
    name = desk.make()
    login = desk.find(name)
    with desk.superuser() as db, db.transaction():
        db.execute(SQL("ALTER ROLE {} CONNECTION LIMIT 3").format(Identifier(name)))
        problem = failure(lambda: PostgresLogins(desk.target(), deadline=timedelta(seconds=1)).end(login))
    assert isinstance(problem, ProviderUnavailable)
    desk.logins().end(login)


class Falters:
    """A way to the server that is cut off, without an end, as soon as it is asked for the logins."""

    def __init__(self, desk):
        self._path = f"{desk._server.query['host']}/.s.PGSQL.5432"
        self._sockets = []

    def __enter__(self):
        listener = socket.create_server(("127.0.0.1", 0))
        self._sockets.append(listener)
        threading.Thread(target=self._serve, args=(listener,), daemon=True).start()
        return f"127.0.0.1:{listener.getsockname()[1]}"

    def _serve(self, listener):
        with contextlib.suppress(OSError):
            client, _ = listener.accept()
            server = socket.socket(socket.AF_UNIX)
            self._sockets += [client, server]
            server.connect(self._path)
            threading.Thread(target=self._back, args=(client, server), daemon=True).start()
            while data := client.recv(65536):
                if b"rolvaliduntil" in data:
                    return  # heard, and never answered
                server.sendall(data)

    @staticmethod
    def _back(client, server):
        with contextlib.suppress(OSError):
            while data := server.recv(65536):
                client.sendall(data)

    def __exit__(self, *_):
        for each in self._sockets:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "hunter2",
        "postgresql://maintenance@/desk\npostgresql://maintenance@/desk",
        "mysql://maintenance:hunter2@db.example/desk",
        "postgresql://maintenance:hunter2@db.example",
        "postgresql://maintenance:hunter2@db.example/",
        "postgresql://:hunter2@db.example/desk",
        "postgresql://maintenance:123/hunter2@db.example/desk",
        "postgresql://maintenance:123?hunter2@db.example/desk",
        "postgresql://maintenance:123#hunter2@db.example/desk",
        "postgresql://maintenance:12@hunter2@db.example/desk",
        "postgresql://maintenance:hun ter2@db.example/desk",
        "postgresql://maintenance@db.example/desk?password=hunter2",
        "postgresql://maintenance@db.example/desk?sslmode=require&passfile=/hunter2",
        "postgresql://maintenance@db.example/desk?service=hunter2",
    ],
    ids=ascii,
)
def test_a_url_that_could_be_read_in_two_ways_is_refused_without_showing_it(tmp_path, text):
    with pytest.raises(Invalid) as refused:
        target_url(text)
    assert "hunter2" not in refused.value.detail
    target = Target(name="desk", url_file=tmp_path / "url", heir="desk_heir")
    target.url_file.write_text(text)
    problem = failure(PostgresLogins(target).list_logins)
    assert str(target.url_file) in problem.reason


def test_a_file_that_is_gone_is_told(tmp_path):
    target = Target(name="desk", url_file=tmp_path / "url", heir="desk_heir")
    assert "cannot be read: No such file" in failure(PostgresLogins(target).list_logins).reason


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://maintenance:hunter2@db.example:5432/orders?sslmode=verify-full&sslrootcert=/etc/ssl/db.pem",
        "postgres://maintenance:hun%40ter2@[::1]:5432/orders",
        "postgresql://maintenance@/orders?host=/run/postgresql",
        "postgresql://m:p@one.example:5432,two.example:5432/orders?target_session_attrs=read-write",
    ],
)
def test_a_url_that_postgresql_reads_as_we_do_is_taken(url):
    assert target_url(url) == url
    assert psycopg.conninfo.conninfo_to_dict(url)["dbname"] == "orders"


# --- with a real OpenBao ---------------------------------------------------------------------------------------------


@pytest.fixture
def orders(openbao, tmp_path):
    """The logins of the database of the run's OpenBao, as its set-up has them looked at."""
    role = DatabaseRole(source=SOURCES[0], connection="orders", member_of="jit_orders_ro", heir="jit_orders_heir")
    url = sa.make_url(openbao.orders)
    file = tmp_path / "url"
    file.write_text(f"postgresql://{role.maintenance}@/{url.database}?host={url.query['host']}")
    with openbao.superuser() as db:
        db.execute(role.maintenance_sql(administrator="vault_admin"))
    yield PostgresLogins(Target(name="orders", url_file=file, heir="jit_orders_heir"))
    with openbao.superuser() as db:
        db.execute(f"DROP ROLE {role.maintenance}")


def test_a_user_that_openbao_made_is_found_by_its_grant_and_ended_whatever_openbao_knows(openbao, orders):
    provider = VaultProvider(openbao.settings(), system_clock, lambda: SOURCES)
    request = SecretRequest(grant_id=new_id("grt", system_clock()), settings=DATABASE)
    handle = provider.prepare(request, timedelta(minutes=2))
    secret = provider.issue(handle, request, timedelta(minutes=2))
    data = secret.data.reveal()
    with connect(openbao, data) as session:
        session.execute("CREATE TABLE strays (id int)")
        (found,) = [login for login in orders.list_logins() if login.grant_id == request.grant_id]
        assert (found.name, found.sessions) == (data["username"], 1)
        assert timedelta(0) < found.valid_until - system_clock() <= timedelta(minutes=11)
        orders.end(found)
        assert is_cut(session)
    with pytest.raises(psycopg.OperationalError):
        connect(openbao, data)
    with openbao.superuser() as db:
        owner = db.execute("SELECT tableowner FROM pg_tables WHERE tablename = 'strays'").fetchone()
        db.execute("DROP TABLE strays")
    assert owner == ("jit_orders_heir",)
    # What Vault itself owes is paid all the same.
    provider.revoke(handle, secret.reference)
    assert provider.list_live() == ()
    provider.close()
