//! What the server answers about the session of a control channel: opened, attached again, carried on by another one.

use actix::Context;
use strandline_messages::wire::{Ack, Message, RefusalCode, Refused, SessionOpened, Tag};
use tracing::{info, warn};

use super::{AskError, ControlChannel, Own, Pending, Request};
use crate::dispatcher::{LearnDurable, UseSession};
use crate::machines::reconnect::Reconnect;
use crate::planted::{self, Bug};
use crate::stream_pool::SessionGrant;

impl ControlChannel {
    pub(super) fn open_answered(&mut self, message: Message) {
        let Some((_, reply)) = self.opening.take() else { return };
        let answer = match message {
            Message::SessionOpened(opened) => {
                self.reconnect = Reconnect::new(self.policy, u64::from(self.next_tag));
                self.session_opened(&opened);
                Ok(opened)
            }
            Message::Refused(refusal) => Err(AskError::Refused(refusal)),
            other => Err(AskError::Refused(Refused::new(
                RefusalCode::Internal,
                format!("the server answered OpenSession with {}", other.name()),
            ))),
        };
        let _ = reply.send(answer);
    }

    fn session_opened(&mut self, opened: &SessionOpened) {
        if let Some(attachment) = &mut self.attachment {
            attachment.incarnation = opened.incarnation;
            attachment.opened = Some(opened.clone());
            if let Some(dispatcher) = &attachment.dispatcher {
                dispatcher.session.do_send(UseSession(SessionGrant::from(opened)));
            }
        }
    }

    pub(super) fn attach_answered(&mut self, message: Message, ctx: &mut Context<Self>) {
        match message {
            Message::Attached(attached) => {
                info!("re-attached to the session");
                if let Some(attachment) = &mut self.attachment {
                    attachment.incarnation = attached.incarnation;
                    if let Some(dispatcher) = &attachment.dispatcher {
                        let ack = Ack { watermark: attached.watermark, ranges: attached.ranges };
                        dispatcher.durable.do_send(LearnDurable(ack));
                    }
                }
                self.become_ready(ctx);
            }
            Message::Refused(refusal) if refusal.code == RefusalCode::NoSuchSession => self.resume(ctx),
            Message::Refused(refusal) if refusal.code == RefusalCode::Stopping => self.lost(&refusal.message, ctx),
            Message::Refused(refusal) => self.fail(&AskError::Refused(refusal), ctx),
            other => self.lost(&format!("Attach was answered with {}", other.name()), ctx),
        }
    }

    /// The server has lost the session: another one carries on for it.
    fn resume(&mut self, ctx: &mut Context<Self>) {
        let tag = self.tag();
        self.own = Some(Own::Resume(tag));
        self.ask(tag, ctx);
    }

    pub(super) fn resume_answered(&mut self, message: Message, ctx: &mut Context<Self>) {
        match message {
            Message::SessionOpened(opened) => {
                warn!("the server had lost the session; another one carries on for it");
                self.session_opened(&opened);
                // A commit names the number of blocks of its session: it must be asked anew.
                if !planted::here(Bug::CommitsWithTheOldCount) {
                    self.settle_commits(&Err(AskError::Replaced));
                }
                self.become_ready(ctx);
            }
            Message::Committed(committed) => {
                self.settle_commits(&Ok(Message::Committed(committed.clone())));
                if let Some(attachment) = &mut self.attachment {
                    attachment.committed = Some(committed);
                }
                self.become_ready(ctx);
            }
            Message::Refused(refusal) if refusal.code == RefusalCode::Stopping => self.lost(&refusal.message, ctx),
            Message::Refused(refusal) => self.fail(&AskError::Refused(refusal), ctx),
            other => self.lost(&format!("OpenSession was answered with {}", other.name()), ctx),
        }
    }

    fn settle_commits(&mut self, answer: &Result<Message, AskError>) {
        let is_commit = |(_, pending): &(&Tag, &Pending)| matches!(pending.request, Request::Fixed(Message::Commit(_)));
        let tags: Vec<_> = self.pending.iter().filter(is_commit).map(|(tag, _)| *tag).collect();
        for tag in tags {
            if let Some(pending) = self.pending.remove(&tag) {
                let _ = pending.reply.send(answer.clone());
            }
        }
    }
}
