//! Rows of `sessions` and `leases`. A session reaches one terminal state and never leaves it: every update asks for `open`.

use strandline_messages::{AgentId, DomainId, SessionId};

use super::{Catalog, CatalogError, id, signed, sql, unsigned};

/// How many sessions may have taken over from one another before a chain is no longer followed.
const CHAIN_MAX: usize = 16;

/// The right to write, under an epoch that protects what this session was told is known.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lease {
    /// The session that holds it.
    pub session: SessionId,
    /// The machine.
    pub agent: AgentId,
    /// The writer domain in which it writes and knows.
    pub domain: DomainId,
    /// Blocks condemned at this epoch or later stay known to the session.
    pub epoch: u64,
    /// Tells this lease from any that takes its place.
    pub fence: u64,
}

/// What became of a request to open a session.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Opened {
    /// A new session.
    Fresh(Lease),
    /// The session to be resumed had committed already.
    AlreadyCommitted {
        /// The signed receipt.
        receipt: Vec<u8>,
    },
}

/// How a session ended, if not by a commit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SessionEnd {
    /// A restore got everything that it asked for.
    Finished,
    /// Something went wrong on the server, or another session took over.
    Failed,
    /// The agent gave up.
    Aborted,
    /// Nobody came back, or nothing moved, for too long.
    Expired,
}

impl SessionEnd {
    /// The state's name in the catalog.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Finished => "finished",
            Self::Failed => "failed",
            Self::Aborted => "aborted",
            Self::Expired => "expired",
        }
    }
}

/// A session as `status` shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SessionRow {
    /// The session.
    pub id: SessionId,
    /// The machine.
    pub agent: AgentId,
    /// `open`, `committed`, `failed`, `aborted` or `expired`.
    pub state: String,
    /// Why it ended.
    pub reason: String,
    /// When it was opened, ns since 1970.
    pub opened_ns: i64,
    /// When it ended, ns since 1970.
    pub ended_ns: Option<i64>,
}

/// Who opens a session where.
#[derive(Clone, Copy, Debug)]
pub(crate) struct NewSession<'a> {
    pub repository: i64,
    pub tenant: &'a str,
    pub session: SessionId,
    pub agent: AgentId,
    pub domain: DomainId,
    pub resume_of: Option<SessionId>,
    /// Whether what it is told to be known must stay so: it writes.
    pub writes: bool,
    pub now_ns: i64,
}

/// The epoch of a lease that holds nothing back: later than any.
const NO_EPOCH: u64 = i64::MAX as u64;

/// State, receipt, successor, epoch.
type OldSession = (String, Option<Vec<u8>>, Option<Vec<u8>>, i64);

impl Catalog {
    /// Opens a session, in one transaction with ending the one that it resumes. Also says which session that was.
    pub(crate) async fn open_session(&self, new: NewSession<'_>) -> Result<(Opened, Option<SessionId>), CatalogError> {
        let doing = "open a session";
        let mut transaction = self.begin().await?;
        let mut superseded = None;
        let mut epoch = None;
        let mut next = new.resume_of;
        for _ in 0..CHAIN_MAX {
            let Some(old) = next.take() else { break };
            let row: Option<OldSession> = sqlx::query_as(
                "SELECT s.state, s.receipt, s.superseded_by, l.epoch FROM sessions s JOIN leases l ON l.session = s.id \
                 WHERE s.id = ? AND s.repository = ? AND s.agent = ? AND s.domain = ?",
            )
            .bind(old.as_bytes().as_slice())
            .bind(new.repository)
            .bind(new.agent.as_bytes().as_slice())
            .bind(new.domain.as_bytes().as_slice())
            .fetch_optional(&mut **transaction)
            .await
            .map_err(sql(doing))?;
            match row {
                Some((_, Some(receipt), _, _)) => return Ok((Opened::AlreadyCommitted { receipt }, None)),
                Some((state, None, _, old_epoch)) if state == "open" => {
                    superseded = Some(old);
                    epoch = Some(unsigned(old_epoch));
                }
                Some((_, None, Some(by), _)) => next = Some(id("session id", &by, SessionId::from_slice)?),
                _ => {}
            }
        }
        if let Some(old) = superseded {
            let reason = format!("superseded by session {}", new.session);
            sqlx::query("UPDATE sessions SET state = 'failed', reason = ?, superseded_by = ?, ended_ns = ? WHERE id = ? AND state = 'open'")
                .bind(reason)
                .bind(new.session.as_bytes().as_slice())
                .bind(new.now_ns)
                .bind(old.as_bytes().as_slice())
                .execute(&mut **transaction)
                .await
                .map_err(sql(doing))?;
            end_lease(&mut transaction, &old).await?;
        }
        let (current, fence): (i64, i64) =
            sqlx::query_as("UPDATE repositories SET fence = fence + 1 WHERE number = ? RETURNING epoch, fence")
                .bind(new.repository)
                .fetch_one(&mut **transaction)
                .await
                .map_err(sql(doing))?;
        let epoch = if new.writes { epoch.unwrap_or(unsigned(current)) } else { NO_EPOCH };
        sqlx::query("INSERT INTO sessions (id, repository, tenant, agent, domain, state, opened_ns) VALUES (?, ?, ?, ?, ?, 'open', ?)")
            .bind(new.session.as_bytes().as_slice())
            .bind(new.repository)
            .bind(new.tenant)
            .bind(new.agent.as_bytes().as_slice())
            .bind(new.domain.as_bytes().as_slice())
            .bind(new.now_ns)
            .execute(&mut **transaction)
            .await
            .map_err(sql(doing))?;
        sqlx::query("INSERT INTO leases (session, repository, epoch, fence) VALUES (?, ?, ?, ?)")
            .bind(new.session.as_bytes().as_slice())
            .bind(new.repository)
            .bind(signed(epoch))
            .bind(fence)
            .execute(&mut **transaction)
            .await
            .map_err(sql(doing))?;
        transaction.commit().await.map_err(sql(doing))?;
        let (session, agent, domain) = (new.session, new.agent, new.domain);
        let lease = Lease { session, agent, domain, epoch, fence: unsigned(fence) };
        Ok((Opened::Fresh(lease), superseded))
    }

    /// Whether a session of that id was ever opened.
    pub(crate) async fn session_exists(&self, session: &SessionId) -> Result<bool, CatalogError> {
        let query = sqlx::query_scalar("SELECT 1 FROM sessions WHERE id = ?").bind(session.as_bytes().as_slice());
        let row: Option<i64> = query.fetch_optional(self.pool()).await.map_err(sql("look up a session"))?;
        Ok(row.is_some())
    }

    /// Ends a session that is open; `false` if it had ended before, which changes nothing.
    pub(crate) async fn end_session(
        &self,
        session: &SessionId,
        fence: u64,
        end: SessionEnd,
        reason: &str,
        now_ns: i64,
    ) -> Result<bool, CatalogError> {
        let mut transaction = self.begin().await?;
        let done = sqlx::query(
            "UPDATE sessions SET state = ?, reason = ?, ended_ns = ? WHERE id = ? AND state = 'open' \
             AND EXISTS (SELECT 1 FROM leases WHERE session = sessions.id AND fence = ? AND ended = 0)",
        )
        .bind(end.as_str())
        .bind(reason)
        .bind(now_ns)
        .bind(session.as_bytes().as_slice())
        .bind(signed(fence))
        .execute(&mut **transaction)
        .await
        .map_err(sql("end a session"))?;
        let ended = done.rows_affected() == 1;
        if ended {
            end_lease(&mut transaction, session).await?;
        }
        transaction.commit().await.map_err(sql("end a session"))?;
        Ok(ended)
    }

    /// The leases of a repository's open sessions.
    pub(crate) async fn open_leases(&self, repository: i64) -> Result<Vec<Lease>, CatalogError> {
        type Row = (Vec<u8>, Vec<u8>, Vec<u8>, i64, i64);
        let rows: Vec<Row> = sqlx::query_as(
            "SELECT s.id, s.agent, s.domain, l.epoch, l.fence FROM sessions s JOIN leases l ON l.session = s.id \
             WHERE s.repository = ? AND s.state = 'open' AND l.ended = 0 ORDER BY l.fence",
        )
        .bind(repository)
        .fetch_all(self.pool())
        .await
        .map_err(sql("list the leases"))?;
        let row = |(session, agent, domain, epoch, fence): Row| {
            Ok(Lease {
                session: id("session id", &session, SessionId::from_slice)?,
                agent: id("agent id", &agent, AgentId::from_slice)?,
                domain: id("writer domain", &domain, DomainId::from_slice)?,
                epoch: unsigned(epoch),
                fence: unsigned(fence),
            })
        };
        rows.into_iter().map(row).collect()
    }

    /// The newest `limit` sessions of a repository, newest first.
    pub(crate) async fn sessions(&self, repository: i64, limit: usize) -> Result<Vec<SessionRow>, CatalogError> {
        type Row = (Vec<u8>, Vec<u8>, String, String, i64, Option<i64>);
        let rows: Vec<Row> = sqlx::query_as(
            "SELECT id, agent, state, reason, opened_ns, ended_ns FROM sessions WHERE repository = ? \
             ORDER BY opened_ns DESC LIMIT ?",
        )
        .bind(repository)
        .bind(i64::try_from(limit).unwrap_or(i64::MAX))
        .fetch_all(self.pool())
        .await
        .map_err(sql("list the sessions"))?;
        let row = |(session, agent, state, reason, opened_ns, ended_ns): Row| {
            let (session, agent) =
                (id("session id", &session, SessionId::from_slice)?, id("agent id", &agent, AgentId::from_slice)?);
            Ok(SessionRow { id: session, agent, state, reason, opened_ns, ended_ns })
        };
        rows.into_iter().map(row).collect()
    }
}

pub(super) async fn end_lease(
    connection: &mut sqlx::SqliteConnection,
    session: &SessionId,
) -> Result<(), CatalogError> {
    let query = sqlx::query("UPDATE leases SET ended = 1 WHERE session = ?").bind(session.as_bytes().as_slice());
    query.execute(connection).await.map(|_| ()).map_err(sql("end a lease"))
}
