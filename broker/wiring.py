"""The stairs: the only place where things are built, from settings that are already checked."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from broker import telemetry
from broker.config import Settings, read_master_key
from broker.config.files import require_secret
from broker.config.wording import Wrong
from broker.domain.approval import Route
from broker.domain.clock import Clock, system_clock
from broker.domain.errors import ConfigurationError, ProviderRefused
from broker.domain.secret import Secret
from broker.domain.shared_signals import Transmitter
from broker.providers.alerts import Alerts, NoAlerts, WebhookAlerts
from broker.providers.base import Provider, third_party
from broker.providers.key_sets import KeySets
from broker.providers.notices import Channel, channel
from broker.providers.targets import Logins, PostgresLogins
from broker.providers.vault import SecretSource, VaultProvider
from broker.providers.vault.administration import VaultSetup, brokered
from broker.providers.vault.transit import TransitKey
from broker.providers.wakeups import Wakeups
from broker.services.activities import Activities
from broker.services.administration import Administration
from broker.services.alerting import Alerting
from broker.services.approval import Approvals
from broker.services.asked import Versions
from broker.services.audit_trail import AuditTrail
from broker.services.authentication import Authenticator
from broker.services.breakers import Breakers
from broker.services.broadcast import Broadcast, Places
from broker.services.collection import Collection
from broker.services.debts import Debts
from broker.services.explaining import Explaining
from broker.services.feed import Feed
from broker.services.issuance import Issuance
from broker.services.keys import Envelope, Keys, MasterKey, Sealing
from broker.services.leases import Leases
from broker.services.limits import Limiter
from broker.services.notifying import Notifying
from broker.services.proofs import Proofs
from broker.services.receiving import Receiving
from broker.services.reconciliation import Reconciliation, settings_in_use
from broker.services.redeciding import Redeciding
from broker.services.renewal import Renewal
from broker.services.replaying import Replaying
from broker.services.reviews import Reviews
from broker.services.revocation import Revocation
from broker.services.secrets import Secrets
from broker.services.signals import Signals
from broker.services.standing import StandingReader
from broker.services.status_indexes import StatusIndexes
from broker.services.streams import Streams
from broker.services.sweeper import Sweeper
from broker.services.tasks import TaskService
from broker.services.timeline import Timeline
from broker.services.transmitting import Transmitting
from broker.services.verification import Verification
from broker.services.waiting import Waiting
from broker.store.clock import DatabaseClock
from broker.store.database import Database
from broker.store.feed import CHANNEL
from broker.store.listening import listen
from broker.store.migration import is_current, migrate

_POLLS_OF_SERVE = 16  # each takes a thread while it waits; one more is answered at once


@dataclass(frozen=True, kw_only=True)
class Broker:
    """Everything a door needs, once per process."""

    settings: Settings
    clock: Clock
    database: Database
    keys: Keys
    key_sets: KeySets
    standing: StandingReader
    authenticator: Authenticator
    proofs: Proofs
    issuance: Issuance
    renewal: Renewal
    approvals: Approvals
    collection: Collection
    reviews: Reviews
    waiting: Waiting
    tasks: TaskService
    revocation: Revocation
    leases: Leases
    debts: Debts
    reconciliation: Reconciliation
    alerting: Alerting
    notifying: Notifying
    verification: Verification
    feed: Feed
    broadcast: Broadcast
    feed_places: Places
    feed_waiting: Places
    streams: Streams
    transmitting: Transmitting
    receiving: Receiving
    explaining: Explaining
    administration: Administration
    redeciding: Redeciding
    replaying: Replaying
    signals: Signals
    audit_trail: AuditTrail
    activities: Activities
    timeline: Timeline
    sweeper: Sweeper
    wakeups: Wakeups

    def migrate(self) -> None:
        """Bring the database to the revision this code expects."""
        migrate(self.database)

    def is_migrated(self) -> bool:
        return is_current(self.database)

    def apply(self, *, by: str, allow_older: bool = False) -> int:
        """Store the configuration file as the newest version, unless it is already; answers its number."""
        return self.administration.apply(self.settings.catalogue, by=by, allow_older=allow_older)

    def look_again(self) -> None:
        """Learn what changed without a request: the time, and what other brokers on this database decided."""
        if isinstance(self.clock, DatabaseClock):
            self.clock.look()
        self.standing.now()
        self.reconciliation.begin()

    def stop(self) -> None:
        """Begin nothing more that takes long, and let nobody wait on; what is under way is ended."""
        self.broadcast.stop()
        self.waiting.stop()
        self.debts.stop()

    def close(self) -> None:
        self.broadcast.stop()
        self.waiting.stop()
        self.transmitting.close()
        self.debts.close()
        self.keys.close()
        self.database.close()


def build(
    settings: Settings,
    *,
    clock: Clock | None = None,
    providers: Mapping[str, Provider] | None = None,
    targets: Mapping[str, Logins] | None = None,
) -> Broker:
    """A broker of these settings. Opens files and connections as they are needed; starts nothing.

    `providers` and `targets` stand in for those that the settings name.
    """
    # Whoever reads the feed in this process is woken by what it commits itself; of others PostgreSQL tells.
    database = Database(settings.store_url, committed=telemetry.committed, announced=lambda: broadcast.ring())
    if clock is None:
        # One clock decides (INV-09): on SQLite there is one process and its own will do.
        clock = system_clock if database.is_sqlite else DatabaseClock(database)
    sealing = _sealing(settings, clock)
    keys = Keys(
        database=database,
        sealing=sealing,
        clock=clock,
        rotate_every=settings.rotate_every,
        max_ttl=settings.limits.max_ttl,
    )
    standing = StandingReader(database=database, keys=keys, clock=clock)
    key_sets = KeySets()
    issuer, limits = settings.issuer, settings.limits
    indexes = StatusIndexes(database=database, longest_life=2 * limits.max_ttl)
    wakeups = Wakeups(settings.redis_url)
    if providers is None:
        providers = _providers(settings, database, standing, clock, lambda name: reconciliation.distrust(name))
    if targets is None:
        targets = {target.name: PostgresLogins(target) for target in settings.targets}
    reconciliation = Reconciliation(database=database, providers=providers, targets=targets, clock=clock)
    debts = Debts(database=database, providers=providers, targets=targets, clock=clock)
    secrets = Secrets(
        database=database, standing=standing, providers=providers, reconciliation=reconciliation, clock=clock
    )
    revocation = Revocation(
        database=database, standing=standing, debts=debts, keys=keys, wakeups=wakeups, issuer=issuer, clock=clock
    )
    limiter = Limiter(database=database, standing=standing, limits=limits, clock=clock)
    breakers = Breakers(database=database, standing=standing, revocation=revocation, limits=limits, clock=clock)
    feed = Feed(database=database, standing=standing, issuer=issuer, clock=clock)

    def heard(ring: Callable[[], None]) -> Callable[[], None]:
        stops = (listen(database, CHANNEL, ring), wakeups.listen(ring))

        def stopped() -> None:
            for stop in stops:
                stop()

        return stopped

    broadcast = Broadcast(feed, listen=heard)
    streams = Streams(
        database=database,
        feed=feed,
        keys=keys,
        sealing=sealing,
        bounds=settings.ssf.bounds,
        inside=settings.ssf.push_networks,
        issuer=issuer,
        clock=clock,
    )
    versions = Versions(database=database, standing=standing)
    redeciding = Redeciding(database=database, standing=standing, versions=versions, clock=clock)
    tasks = TaskService(database=database, standing=standing, debts=debts, limits=limits, issuer=issuer, clock=clock)
    signals = Signals(database=database, standing=standing, redeciding=redeciding, wakeups=wakeups, clock=clock)
    return Broker(
        settings=settings,
        clock=clock,
        database=database,
        keys=keys,
        key_sets=key_sets,
        standing=standing,
        authenticator=Authenticator(database=database, key_sets=key_sets, audience=issuer),
        proofs=Proofs(database),
        issuance=Issuance(
            database=database,
            standing=standing,
            indexes=indexes,
            reconciliation=reconciliation,
            secrets=secrets,
            limiter=limiter,
            breakers=breakers,
            limits=limits,
            issuer=issuer,
            clock=clock,
            routes=[Route(channel=told.name, groups=told.groups) for told in settings.notify],
        ),
        renewal=Renewal(
            database=database,
            standing=standing,
            limiter=limiter,
            breakers=breakers,
            limits=limits,
            issuer=issuer,
            clock=clock,
        ),
        approvals=Approvals(database=database, standing=standing, limits=limits, clock=clock),
        collection=Collection(
            database=database,
            standing=standing,
            indexes=indexes,
            reconciliation=reconciliation,
            secrets=secrets,
            limiter=limiter,
            breakers=breakers,
            limits=limits,
            issuer=issuer,
            clock=clock,
        ),
        reviews=Reviews(database=database, standing=standing, clock=clock),
        waiting=Waiting(),
        tasks=tasks,
        revocation=revocation,
        leases=Leases(database=database, clock=clock),
        debts=debts,
        reconciliation=reconciliation,
        alerting=Alerting(database=database, alerts=_alerts(settings, clock), clock=clock),
        notifying=Notifying(
            database=database, standing=standing, channels=_channels(settings, clock), issuer=issuer, clock=clock
        ),
        verification=Verification(database=database, standing=standing, issuer=issuer, clock=clock),
        feed=feed,
        broadcast=broadcast,
        feed_places=Places.shared(settings.feed.streams_of_serve),
        feed_waiting=Places.shared(_POLLS_OF_SERVE),
        streams=streams,
        transmitting=Transmitting(
            database=database,
            standing=standing,
            feed=feed,
            streams=streams,
            inside=settings.ssf.push_networks,
            issuer=issuer,
            clock=clock,
            counted=telemetry.sets_sent,
        ),
        receiving=Receiving(
            database=database,
            standing=standing,
            key_sets=key_sets,
            revocation=revocation,
            signals=signals,
            tasks=tasks,
            transmitters=settings.transmitters,
            token_of=_poll_token,
            clock=clock,
            counted=telemetry.sets_received,
        ),
        explaining=Explaining(database=database, versions=versions),
        administration=Administration(
            database=database, standing=standing, redeciding=redeciding, keys=keys, wakeups=wakeups, clock=clock
        ),
        redeciding=redeciding,
        replaying=Replaying(
            database=database, standing=standing, versions=versions, redeciding=redeciding, clock=clock
        ),
        signals=signals,
        audit_trail=AuditTrail(database=database),
        activities=Activities(database=database, standing=standing, limits=limits, clock=clock),
        timeline=Timeline(database=database),
        sweeper=Sweeper(
            database=database,
            revocation=revocation,
            keys=keys,
            feed_kept_for=settings.feed.kept_for,
            keep_activities=limits.keep_activities,
            clock=clock,
        ),
        wakeups=wakeups,
    )


def _poll_token(transmitter: Transmitter) -> Secret | None:
    """What opens a transmitter that is polled, as its file has it now."""
    if transmitter.poll_token_file is None:
        return None
    try:
        return require_secret(Path(transmitter.poll_token_file), "the token")
    except Wrong as wrong:
        reason = str(wrong)
    raise ProviderRefused(f"there is nothing to poll {transmitter.name} with", reason=reason)


def _alerts(settings: Settings, clock: Clock) -> Alerts:
    if settings.alerts is None:
        return NoAlerts()
    return WebhookAlerts(settings.alerts.webhook_url, settings.alerts.secret, clock=clock)


def _channels(settings: Settings, clock: Clock) -> Mapping[str, Channel]:
    return {told.name: channel(told, clock) for told in settings.notify}


def _sealing(settings: Settings, clock: Clock) -> Sealing:
    if settings.vault_transit is not None and settings.vault is not None:
        return Envelope(TransitKey(settings.vault, settings.vault_transit, clock))
    if settings.master_key_file is None:
        raise ConfigurationError(["keys: neither a master_key_file nor a vault_transit with a section [vault]"])
    return MasterKey(read_master_key(settings.master_key_file))


def vault_setup(settings: Settings) -> VaultSetup:
    """What these settings need at Vault, and the hand that sets it up and proves it."""
    of_vault = (resource for resource in settings.catalogue.resources if resource.provider == "vault")
    found = brokered((resource.identifier, resource.settings, resource.max_ttl_s) for resource in of_vault)
    if settings.vault is None or not (found or settings.vault_transit):
        missing = "no section [vault]" if settings.vault is None else 'no resource with provider = "vault"'
        raise ConfigurationError([f"{settings.source}: there is {missing}; add one, docs/how-to/vault.md shows it"])
    return VaultSetup(settings=settings.vault, resources=found, clock=system_clock, wrapping_key=settings.vault_transit)


def _providers(
    settings: Settings,
    database: Database,
    standing: StandingReader,
    clock: Clock,
    distrust: Callable[[str], object],
) -> Mapping[str, Provider]:
    """Every system outside that makes secrets, by the name that a resource says."""
    found: dict[str, Provider] = {name: third_party(name)(given, clock) for name, given in settings.providers.items()}

    def sources() -> Iterable[SecretSource]:
        return map(SecretSource.parse, settings_in_use(database, standing, "vault"))

    if settings.vault is not None:
        found["vault"] = VaultProvider(settings.vault, clock, sources, forgotten=lambda: distrust("vault"))
    return found
