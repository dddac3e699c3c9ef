//! `strand key`: list and remove key slots; `key_add` makes new ones.

use std::path::PathBuf;

use anyhow::{anyhow, bail};
use clap::{Args, Subcommand, ValueEnum};
use data_encoding::HEXLOWER;
use serde::Serialize;
use strandline_messages::format::keys::{Capability, KeySlotV1, SlotKind};
use strandline_messages::wire::manage::Operation;

use super::Fate;
use super::args::Global;
use super::key_add;
use super::output;
use super::repository::Opened;
use super::settings::Place;

/// `strand key`.
#[derive(Args, Debug)]
pub struct Key {
    /// What to do.
    #[command(subcommand)]
    pub command: KeyCommand,
}

/// `strand key …`.
#[derive(Subcommand, Debug)]
pub enum KeyCommand {
    /// List the repository's key slots
    List,
    /// Add a key slot: one more secret that opens the repository with all rights
    Add(Add),
    /// Remove key slots; never the last one
    Remove(Remove),
    /// Replace the passphrase that the repository is opened with
    Passwd(Passwd),
    /// Make a key file for another holder, who may do everything, only write or only read
    Export(Export),
}

/// `strand key add`.
#[derive(Args, Debug)]
pub struct Add {
    /// The new secret.
    #[command(flatten)]
    pub secret: NewSecret,
    /// Name of the slot for people [default: its kind, or this machine's host name for a key file]
    #[arg(long)]
    pub label: Option<String>,
}

/// What a new slot is opened with.
#[derive(Args, Debug)]
#[group(required = true, multiple = false)]
#[expect(clippy::struct_field_names, reason = "they are the names of the options")]
pub struct NewSecret {
    /// A passphrase: the first line of this file
    #[arg(long, value_name = "FILE")]
    pub new_password_file: Option<PathBuf>,
    /// A passphrase: the first line that this command says
    #[arg(long, value_name = "COMMAND")]
    pub new_password_command: Option<String>,
    /// A key file; made if it does not exist [default: this machine's own]
    #[arg(long, value_name = "FILE")]
    #[expect(clippy::option_option, reason = "an option that may or may not have a value")]
    pub new_key_file: Option<Option<PathBuf>>,
    /// A new recovery key, which is printed once
    #[arg(long)]
    pub new_recovery: bool,
}

/// `strand key remove`.
#[derive(Args, Debug)]
pub struct Remove {
    /// Ids of slots, or their beginnings
    #[arg(required = true, value_name = "ID")]
    pub ids: Vec<String>,
    /// Remove the slot in use, too; nobody checks that another one with all rights is left
    #[arg(long)]
    pub force: bool,
}

/// `strand key passwd`.
#[derive(Args, Debug)]
#[group(required = true, multiple = false)]
pub struct Passwd {
    /// The new passphrase: the first line of this file
    #[arg(long, value_name = "FILE")]
    pub new_password_file: Option<PathBuf>,
    /// The new passphrase: the first line that this command says
    #[arg(long, value_name = "COMMAND")]
    pub new_password_command: Option<String>,
}

/// `strand key export`.
#[derive(Args, Debug)]
pub struct Export {
    /// What the holder may do
    #[arg(long, value_enum, value_name = "WHAT")]
    pub capability: Rights,
    /// Where to write the key file; it must not exist
    #[arg(long, value_name = "FILE")]
    pub out: PathBuf,
    /// Name of the slot for people [default: what the holder may do]
    #[arg(long)]
    pub label: Option<String>,
}

/// `--capability`.
#[derive(ValueEnum, Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rights {
    /// Everything
    Full,
    /// Back up; neither read nor remove anything
    Write,
    /// List and restore; neither back up nor remove anything
    Read,
}

impl From<Rights> for Capability {
    fn from(rights: Rights) -> Self {
        match rights {
            Rights::Full => Self::Full,
            Rights::Write => Self::Write,
            Rights::Read => Self::Read,
        }
    }
}

/// Runs the command.
pub async fn run(global: &Global, place: &Place, key: Key) -> anyhow::Result<Fate> {
    let opened = match key.command {
        KeyCommand::Passwd(_) => Opened::by_passphrase(global, place).await?,
        _ => Opened::existing(global, place).await?,
    };
    let done = match key.command {
        KeyCommand::List => list(global, &opened),
        KeyCommand::Add(add) => key_add::add(global, place, &opened, add).await,
        KeyCommand::Remove(wanted) => remove(global, &opened, &wanted).await,
        KeyCommand::Passwd(new) => key_add::passwd(global, &opened, new).await,
        KeyCommand::Export(export) => key_add::export(global, &opened, export).await,
    };
    let closed = opened.server.close().await;
    done?;
    closed?;
    Ok(Fate::Done)
}

/// What a keyset of this capability is called.
pub fn rights(capability: Capability) -> &'static str {
    match capability {
        Capability::Full => "full",
        Capability::Write => "write",
        Capability::Read => "read",
    }
}

/// What a slot of this kind is opened with.
pub fn kind(kind: &SlotKind) -> &'static str {
    match kind {
        SlotKind::KeyFile => "key file",
        SlotKind::Passphrase { .. } => "passphrase",
        SlotKind::Recovery => "recovery key",
    }
}

/// A slot's id as commands print and take it.
pub fn id_text(id: &[u8; 16]) -> String {
    HEXLOWER.encode(id)
}

/// The first digits of an id, for people.
pub fn short(id: &str) -> &str {
    id.get(..8).unwrap_or(id)
}

#[derive(Serialize)]
struct Line {
    id: String,
    kind: &'static str,
    label: String,
    created: String,
    in_use: bool,
    /// Only of the slot in use: the others' cannot be known without opening them.
    capability: Option<&'static str>,
    #[serde(skip)]
    created_ns: i64,
}

fn lines(opened: &Opened) -> Vec<Line> {
    let line = |bytes: &Vec<u8>| match KeySlotV1::decode(bytes) {
        Ok(slot) => {
            let in_use = slot.id == opened.slot;
            Line {
                id: id_text(&slot.id),
                kind: kind(&slot.kind),
                created: output::rfc3339(slot.created_ns),
                created_ns: slot.created_ns,
                in_use,
                capability: in_use.then(|| rights(opened.keyset.capability())),
                label: slot.label,
            }
        }
        Err(_) => Line {
            // Where the id of an undamaged slot stands.
            id: bytes.get(26..42).map(|id| HEXLOWER.encode(id)).unwrap_or_default(),
            kind: "damaged",
            label: String::new(),
            created: String::new(),
            created_ns: i64::MIN,
            in_use: false,
            capability: None,
        },
    };
    let mut lines: Vec<Line> = opened.info.slots.iter().map(line).collect();
    lines.sort_by_key(|line| line.created_ns);
    lines
}

fn list(global: &Global, opened: &Opened) -> anyhow::Result<()> {
    let lines = lines(opened);
    if global.json {
        return lines.iter().try_for_each(output::json_line);
    }
    let row = |line: &Line| {
        let created = if line.created.is_empty() { String::new() } else { output::moment(line.created_ns) };
        let label = output::path(line.label.as_bytes());
        let rights = line.capability.map(|rights| format!("in use, {rights}")).unwrap_or_default();
        vec![short(&line.id).to_owned(), line.kind.to_owned(), created, label, rights]
    };
    let rows: Vec<_> = lines.iter().map(row).collect();
    output::print(output::table(&["ID", "KIND", "CREATED", "LABEL", "RIGHTS"], &rows).as_bytes())
}

#[derive(Serialize)]
struct Removed {
    message_type: &'static str,
    id: String,
}

async fn remove(global: &Global, opened: &Opened, wanted: &Remove) -> anyhow::Result<()> {
    opened.keyset.may_manage("remove key slots")?;
    let known: Vec<String> = lines(opened).into_iter().map(|line| line.id).collect();
    let in_use = id_text(&opened.slot);
    let mut chosen = Vec::new();
    for text in &wanted.ids {
        let id = choose(&known, text)?;
        if id == in_use && !wanted.force {
            bail!(
                "key slot {} is the one in use; nothing was removed: open the repository with another key, or say \
                 --force if another one with all rights is left",
                short(&id)
            );
        }
        if !chosen.contains(&id) {
            chosen.push(id);
        }
    }
    for id in chosen {
        remove_slot(opened, &id).await?;
        if global.json {
            output::json_line(&Removed { message_type: "key_removed", id })?;
        } else if !global.quiet {
            output::print(format!("removed key slot {}\n", short(&id)).as_bytes())?;
        }
    }
    Ok(())
}

/// The one slot whose id begins with `text`.
fn choose(known: &[String], text: &str) -> anyhow::Result<String> {
    let wanted = text.to_ascii_lowercase();
    if wanted.len() < 4 || !wanted.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        bail!("`{text}` is no key slot: give at least 4 hexadecimal digits of an id; `strand key list` shows them");
    }
    let mut found = known.iter().filter(|id| id.starts_with(&wanted));
    match (found.next(), found.next()) {
        (Some(one), None) => Ok(one.clone()),
        (Some(_), Some(_)) => bail!("several key slots begin with `{text}`: give more digits"),
        (None, _) => bail!("no key slot begins with `{text}`; `strand key list` shows those that there are"),
    }
}

/// Removes a slot. A request that was carried out but whose answer was lost counts as done.
pub async fn remove_slot(opened: &Opened, id: &str) -> anyhow::Result<()> {
    let raw = HEXLOWER.decode(id.as_bytes()).ok().and_then(|id| <[u8; 16]>::try_from(id).ok());
    let slot = raw.ok_or_else(|| anyhow!("`{id}` is not the id of a key slot"))?;
    let server = &opened.server;
    let removed = server.client.manage(&server.name, &opened.keyset, &Operation::RemoveSlot { slot }).await;
    let Err(error) = removed else { return Ok(()) };
    let left = server.client.describe(&server.name).await;
    let gone = left.is_ok_and(|left| !left.slots.iter().any(|bytes| bytes.get(26..42) == Some(slot.as_slice())));
    if gone { Ok(()) } else { Err(error.into()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slot_is_chosen_by_the_beginning_of_its_id() {
        let known = ["aabb0011".to_owned(), "aabb2233".to_owned(), "ccdd4455".to_owned()];
        assert_eq!(choose(&known, "CCdd").unwrap(), "ccdd4455");
        assert_eq!(choose(&known, "aabb22").unwrap(), "aabb2233");
        for bad in ["aabb", "ccd", "", "eeee", "labe"] {
            assert!(choose(&known, bad).is_err(), "{bad}");
        }
    }
}
