//! What an agent asks of its session, and how it is answered.

use actix::{ActorFutureExt, AsyncContext, Context, ResponseFuture, WrapFuture};
use futures_util::FutureExt;
use strandline_messages::wire::{
    ChunksKnown, Commit, Committed, FetchChunks, Message, MissingChunks, QueryChunks, RefusalCode, SessionKind,
    join_ids, pack_bitmap, split_ids,
};
use strandline_messages::{ChunkId, SnapshotId, limits};
use tokio::sync::oneshot;
use tracing::warn;

use super::{Session, refused};
use crate::machines::session::Input;
use crate::ports::{CommitOutcome, StoreFault};

impl Session {
    pub(super) fn ask(&mut self, request: Message, ctx: &mut Context<Self>) -> ResponseFuture<Message> {
        match (self.seed.kind, request) {
            (SessionKind::Backup, Message::QueryChunks(query)) => self.query(&query),
            (SessionKind::Backup, Message::Commit(commit)) => self.commit(commit, ctx),
            (SessionKind::Restore, Message::FetchChunks(fetch)) => self.fetch(&fetch, ctx),
            (_, Message::AbortSession(abort)) => {
                // What makes no snapshot ends in good order when it is finished; it says so with an empty reason.
                let finished = self.seed.kind != SessionKind::Backup && abort.reason.is_empty();
                self.feed(if finished { Input::Finish } else { Input::Abort(abort.reason) }, ctx);
                self.aborted()
            }
            (_, other) => {
                let text = format!("{} does not belong in this kind of session", other.name());
                std::future::ready(refused(RefusalCode::Invalid, text)).boxed_local()
            }
        }
    }

    /// Answers when the end is recorded: from then on the session holds nothing back.
    pub(super) fn aborted(&mut self) -> ResponseFuture<Message> {
        if self.recorded || self.machine.ended().is_none() {
            return std::future::ready(Message::SessionAborted).boxed_local();
        }
        let (sender, receiver) = oneshot::channel();
        self.recording.push(sender);
        // A session that stops before has been recorded as far as it can be.
        async move { receiver.await.map_or(Message::SessionAborted, |()| Message::SessionAborted) }.boxed_local()
    }

    fn query(&self, query: &QueryChunks) -> ResponseFuture<Message> {
        if self.machine.ended().is_some() {
            return std::future::ready(self.outcome()).boxed_local();
        }
        let Some(ids) = split_ids(&query.ids, limits::QUERY_IDS_MAX) else {
            return std::future::ready(refused(RefusalCode::Invalid, "malformed ids")).boxed_local();
        };
        let asking = self.seed.store.known(ids);
        async move {
            match asking.await {
                Ok(known) => Message::ChunksKnown(ChunksKnown { bitmap: pack_bitmap(&known) }),
                Err(fault) => refused(RefusalCode::Internal, fault.to_string()),
            }
        }
        .boxed_local()
    }

    fn commit(&mut self, commit: Commit, ctx: &mut Context<Self>) -> ResponseFuture<Message> {
        let (sender, receiver) = oneshot::channel();
        self.waiting.push(sender);
        self.manifest = Some(commit.manifest.into_vec().into());
        self.feed(Input::Commit { blocks: commit.blocks }, ctx);
        async move { receiver.await.unwrap_or_else(|_| refused(RefusalCode::Ended, "the session has ended")) }
            .boxed_local()
    }

    fn fetch(&mut self, fetch: &FetchChunks, ctx: &mut Context<Self>) -> ResponseFuture<Message> {
        let ids = split_ids(&fetch.ids, limits::FETCH_IDS_MAX);
        let Some(ids) = ids.filter(|_| self.fetching.may_add(fetch.request)) else {
            return std::future::ready(refused(RefusalCode::Invalid, "too many ids or fetches")).boxed_local();
        };
        let (sender, receiver) = oneshot::channel();
        if self.fetching.ask(fetch.request, sender) {
            self.locate(fetch, ids, ctx);
        }
        async move { receiver.await.unwrap_or_else(|_| refused(RefusalCode::Ended, "the session has ended")) }
            .boxed_local()
    }

    fn locate(&mut self, fetch: &FetchChunks, ids: Vec<ChunkId>, ctx: &mut Context<Self>) {
        let request = fetch.request;
        let snapshot = Some(fetch.snapshot).filter(|snapshot| *snapshot != SnapshotId([0; 32]));
        let locating = self.seed.store.locate(snapshot, ids.clone());
        ctx.spawn(locating.into_actor(self).map(move |places, session, ctx| {
            match places {
                Ok(places) => session.fetching.located(request, ids.into_iter().zip(places).collect()),
                Err(fault) => session.fetching.refuse(request, refused(RefusalCode::Internal, fault.to_string())),
            }
            session.pump(ctx);
        }));
    }

    /// Hands what was read to streams that have room, and reads what the credit covers.
    pub(super) fn pump(&mut self, ctx: &mut Context<Self>) {
        while let Some((index, block)) = self.fetching.next_send() {
            if let Some(joined) = self.streams.get(&index) {
                joined.stream.do_send(block);
            }
        }
        while let Some(errand) = self.fetching.next_read() {
            let reading = self.seed.store.read(errand.place);
            ctx.spawn(reading.into_actor(self).map(move |block, session, ctx| {
                session.fetching.read_ended(errand, block);
                session.pump(ctx);
            }));
        }
    }

    pub(super) fn start_commit(&mut self, ctx: &mut Context<Self>) {
        let Some(manifest) = self.manifest.clone() else {
            return self.feed(Input::Refused, ctx);
        };
        let committing = self.seed.store.commit(manifest);
        ctx.spawn(committing.into_actor(self).map(|outcome, session, ctx| session.commit_came_out(outcome, ctx)));
    }

    fn commit_came_out(&mut self, outcome: Result<CommitOutcome, StoreFault>, ctx: &mut Context<Self>) {
        match outcome {
            Ok(CommitOutcome::Committed { snapshot, receipt }) => {
                self.committed = Some((snapshot, receipt));
                self.feed(Input::Committed, ctx);
                let answer = self.outcome();
                self.answer_waiting(&answer);
            }
            Ok(CommitOutcome::Missing { ids, more }) => {
                self.feed(Input::Missing, ctx);
                self.answer_waiting(&Message::MissingChunks(MissingChunks { ids: join_ids(&ids), more }));
            }
            Ok(CommitOutcome::Refused { reason }) => {
                warn!(session = %self.seed.id.short(), reason, "commit refused");
                self.feed(Input::Refused, ctx);
                self.answer_waiting(&refused(RefusalCode::Invalid, reason));
            }
            Err(fault) => {
                self.full = matches!(fault, StoreFault::Full(_));
                self.feed(Input::Fault(fault.to_string()), ctx);
                let answer = self.outcome();
                self.answer_waiting(&answer);
            }
        }
    }

    /// What an agent that asks after the end is told.
    pub(super) fn outcome(&self) -> Message {
        match &self.committed {
            Some((snapshot, receipt)) => {
                Message::Committed(Committed { snapshot: *snapshot, receipt: receipt.clone().into() })
            }
            None if self.full => refused(RefusalCode::Full, self.ended_because.clone()),
            None => refused(
                RefusalCode::Ended,
                format!("the session ended: {} ({})", self.machine.state_name(), self.ended_because),
            ),
        }
    }

    pub(super) fn answer_waiting(&mut self, answer: &Message) {
        for waiting in self.waiting.drain(..) {
            // Whoever asked may be gone; it will ask again over its next connection.
            let _ = waiting.send(answer.clone());
        }
    }
}
