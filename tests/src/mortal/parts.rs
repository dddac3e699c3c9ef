//! What happens in each part of a server's life.

use std::fs;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::{Life, ensure_no_leftovers};
use crate::proxy::Direction;
use crate::rig::{Agent, PATIENCE, TENANT, json_lines};

impl Life {
    pub(super) fn initialise(&mut self) -> Result<()> {
        let data = self.rig.scratch().join(format!("data-{}", self.lived));
        self.administer(&data, &["init", "--name", "localhost"])?;
        self.administer(&data, &["tenant", "list"])?;
        ensure_no_leftovers(&data)?;
        Ok(fs::remove_dir_all(data)?)
    }

    pub(super) fn create(&mut self) -> Result<()> {
        self.start()?;
        let name = format!("machine-{}", self.lived);
        let machine = self.rig.machine(&name)?.at(&format!("strand://{}/{name}", self.rig.address()));
        // A token may be used up by an attempt whose answer was lost.
        self.insist(None, |life| {
            let token = life.rig.token()?;
            machine.command(&["enroll", &token, "--label", &name])
        })?;
        // The key file is written first: a repository that is there is one that can be used.
        self.insist(Some("exists already"), |_| machine.command(&["init"]))?;
        let password = self.rig.scratch().join("password");
        fs::write(&password, "a password that is long enough")?;
        let password = password.to_str().context("not text")?.to_owned();
        self.insist(None, |_| machine.command(&["key", "add", "--new-password-file", &password]))?;
        self.remove_slots(&machine)
    }

    /// Removes all key slots but the one in use. An attempt whose answer was lost may have removed its slot.
    fn remove_slots(&mut self, machine: &Agent) -> Result<()> {
        loop {
            let listed = machine.run(&["key", "list", "--json"])?;
            if listed.status.success() {
                let slots = json_lines(&listed.stdout)?;
                let other = slots.iter().find(|slot| slot.get("in_use").and_then(Value::as_bool) == Some(false));
                let Some(id) = other.and_then(|slot| slot.get("id")).and_then(Value::as_str) else { return Ok(()) };
                if machine.run(&["key", "remove", id])?.status.success() {
                    continue;
                }
            }
            ensure!(self.revive()?, "the server lives, and slots cannot be removed:\n{}", self.rig.last_words());
        }
    }

    pub(super) fn recover(&mut self) -> Result<()> {
        let deaths = std::mem::take(&mut self.deaths);
        self.start()?;
        self.deaths = deaths;
        let source = self.change()?;
        let before = self.rig.proxy()?.carried_bytes(Direction::ToServer);
        let backup = self.owner.start_backup(&source, &["--streams", "2", "--limit-upload", "1M"])?;
        self.rig.proxy()?.wait_for_bytes(Direction::ToServer, before + 120_000, PATIENCE)?;
        self.start()?;
        self.finish(backup, &source)
    }

    pub(super) fn collect(&mut self) -> Result<()> {
        // Whole packs die with the snapshots that are deleted, and parts of others.
        while self.saved.len() < 3 {
            self.backup()?;
        }
        let gone = self.saved.remove(self.random.index(self.saved.len() - 1));
        fs::remove_dir_all(&gone.copy)?;
        self.start()?;
        self.agent(&["forget", &gone.id])?;
        self.agent(&["prune", "--repack", "--max-unused", "0"])?;
        self.insist(None, |life| life.rig.server_command(&["scrub"]))
    }

    pub(super) fn stop(&mut self) -> Result<()> {
        self.start()?;
        self.backup()?;
        let server = self.rig.server()?;
        server.terminate()?;
        let ended = server.wait(PATIENCE)?.context("the server does not stop")?;
        if ended.code().is_none() {
            self.deaths.pop_front();
        }
        self.start()
    }

    pub(super) fn rescue(&mut self) -> Result<()> {
        self.rig.kill_server();
        let data = self.rig.data().to_owned();
        self.administer(&data, &["repair"])?;
        self.administer(&data, &["catalog", "rebuild"])?;
        for entry in fs::read_dir(self.rig.data())? {
            let path = entry?.path();
            if path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("catalog.sqlite.")) {
                fs::remove_file(path)?;
            }
        }
        // An index that rotted is made anew by the start.
        for repository in fs::read_dir(self.rig.data().join("storage").join(TENANT))? {
            fs::write(repository?.path().join("index/MANIFEST"), "rot")?;
        }
        self.start()
    }
}
