//! `strand key add`, `passwd` and `export`: new key slots.
//!
//! What a slot is opened with is on this machine's disk, or known to its holder, before the slot is in the repository, and
//! nothing is removed before the server lists what was added.

use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use serde::Serialize;
use strandline_actors::runtime::clock;
use strandline_messages::format::keys::{Capability, KeySlotV1, SlotKind};
use strandline_messages::wire::manage::Operation;
use zeroize::Zeroizing;

use super::args::Global;
use super::key::{Add, Export, NewSecret, Passwd, id_text, kind, remove_slot, rights, short};
use super::output;
use super::repository::{Opened, host_name};
use super::secrets;
use super::settings::Place;
use crate::keys::{
    Keyset, SlotSecret, format_recovery_key, key_file_path, load_key_file, random, seal_slot, store_key_file,
};

#[derive(Serialize)]
struct Added<'a> {
    message_type: &'static str,
    id: String,
    kind: &'static str,
    label: &'a str,
    capability: &'static str,
    key_file: Option<&'a Path>,
    recovery_key: Option<&'a str>,
}

/// A secret for a new slot, and what must be told of it.
struct Fresh {
    secret: SlotSecret,
    label: String,
    key_file: Option<PathBuf>,
    recovery_key: Option<Zeroizing<String>>,
}

/// `strand key add`.
pub async fn add(global: &Global, place: &Place, opened: &Opened, add: Add) -> anyhow::Result<()> {
    opened.keyset.may_manage("add key slots")?;
    let own = key_file_path(&place.config_dir, &opened.keyset.repository());
    let fresh = fresh(add.secret, own)?;
    let label = add.label.unwrap_or(fresh.label);
    let slot = add_slot(opened, &opened.keyset, &fresh.secret, &label).await?;
    tell_added(global, &slot, Capability::Full, fresh.key_file.as_deref(), fresh.recovery_key.as_ref())
}

/// `own`: where this machine's key file belongs.
fn fresh(new: NewSecret, own: PathBuf) -> anyhow::Result<Fresh> {
    if let Some(path) = new.new_key_file {
        let path = path.unwrap_or(own);
        let key = if let Some(key) = load_key_file(&path)? {
            key
        } else {
            let key = Zeroizing::new(random()?);
            store_key_file(&path, &key)?;
            key
        };
        let secret = SlotSecret::KeyFile(*key);
        return Ok(Fresh { secret, label: host_name(), key_file: Some(path), recovery_key: None });
    }
    if new.new_recovery {
        let key = Zeroizing::new(random()?);
        let (secret, text) = (SlotSecret::Recovery(*key), format_recovery_key(&key));
        return Ok(Fresh { secret, label: "recovery key".to_owned(), key_file: None, recovery_key: Some(text) });
    }
    let secret = new_passphrase(new.new_password_file.as_deref(), new.new_password_command.as_deref())?;
    Ok(Fresh { secret, label: "passphrase".to_owned(), key_file: None, recovery_key: None })
}

fn new_passphrase(file: Option<&Path>, command: Option<&str>) -> anyhow::Result<SlotSecret> {
    secrets::passphrase_from(file, command)?.context("no new passphrase was given")
}

/// `strand key passwd`: the new slot first, then the old one goes. In between both open the repository.
pub async fn passwd(global: &Global, opened: &Opened, new: Passwd) -> anyhow::Result<()> {
    opened.keyset.may_manage("change passphrases")?;
    let secret = new_passphrase(new.new_password_file.as_deref(), new.new_password_command.as_deref())?;
    let label = label_of(opened);
    let slot = add_slot(opened, &opened.keyset, &secret, &label).await?;
    let old = id_text(&opened.slot);
    remove_slot(opened, &old).await.with_context(|| {
        format!(
            "the new passphrase opens the repository, but the old one still does, too; `strand key remove {}` with the \
             new one removes it",
            short(&old)
        )
    })?;
    tell_added(global, &slot, Capability::Full, None, None)
}

/// The label of the slot in use.
fn label_of(opened: &Opened) -> String {
    let mut slots = opened.info.slots.iter().filter_map(|bytes| KeySlotV1::decode(bytes).ok());
    slots.find(|slot| slot.id == opened.slot).map(|slot| slot.label).unwrap_or_default()
}

/// `strand key export`: a key file, and the slot that it opens, which holds a keyset with its own writer key.
pub async fn export(global: &Global, opened: &Opened, export: Export) -> anyhow::Result<()> {
    let capability = Capability::from(export.capability);
    let keyset = opened.keyset.narrowed(capability)?;
    let label = export.label.unwrap_or_else(|| format!("key file, {}", words(capability)));
    let key = Zeroizing::new(random()?);
    store_key_file(&export.out, &key)?;
    let added = add_slot(opened, &keyset, &SlotSecret::KeyFile(*key), &label).await;
    let slot = match added {
        Ok(slot) => slot,
        Err(error) => {
            // It opens nothing; the error says why.
            let _ = std::fs::remove_file(&export.out);
            return Err(error.context(format!("the key file {} was not kept", export.out.display())));
        }
    };
    tell_added(global, &slot, capability, Some(&export.out), None)?;
    if !global.json && !global.quiet {
        let name = format!("~/.config/strandline/keys/{}.key", opened.keyset.repository());
        let text = format!(
            "Put the file on the other machine as {name} (mode 600), or name it there with --key-file.\n\
             `strand key remove {}` takes it back.\n",
            short(&id_text(&slot.id))
        );
        output::print(text.as_bytes())?;
    }
    Ok(())
}

fn words(capability: Capability) -> &'static str {
    match capability {
        Capability::Full => "full rights",
        Capability::Write => "write only",
        Capability::Read => "read only",
    }
}

/// Seals `keyset` for the secret and adds the slot; done when the server lists it as it was sent.
async fn add_slot(opened: &Opened, keyset: &Keyset, secret: &SlotSecret, label: &str) -> anyhow::Result<KeySlotV1> {
    let slot = seal_slot(keyset, secret, label, clock::wall_ns())?;
    let (server, bytes) = (&opened.server, slot.encode());
    let operation = Operation::AddSlot { slot: bytes.clone().into() };
    server.client.manage(&server.name, &opened.keyset, &operation).await?;
    if !server.client.describe(&server.name).await?.slots.contains(&bytes) {
        bail!(
            "the server took the key slot {} but does not list it; nothing was removed: every key that opened the \
             repository still does",
            short(&id_text(&slot.id))
        );
    }
    Ok(slot)
}

fn tell_added(
    global: &Global,
    slot: &KeySlotV1,
    capability: Capability,
    key_file: Option<&Path>,
    recovery_key: Option<&Zeroizing<String>>,
) -> anyhow::Result<()> {
    let (id, label) = (id_text(&slot.id), slot.label.as_str());
    let recovery_key = recovery_key.map(|text| text.as_str());
    if global.json {
        let (kind, capability) = (kind(&slot.kind), rights(capability));
        return output::json_line(&Added {
            message_type: "key_added",
            id,
            kind,
            label,
            capability,
            key_file,
            recovery_key,
        });
    }
    if let (Some(key), SlotKind::Recovery) = (recovery_key, &slot.kind) {
        let text = Zeroizing::new(format!("recovery key  {key}\nIt is printed only now: write it down.\n"));
        output::print(text.as_bytes())?;
    }
    if global.quiet {
        return Ok(());
    }
    let file = key_file.map(|path| format!(" {}", path.display())).unwrap_or_default();
    let text = format!("added key slot {} ({}{file}, {})\n", short(&id), kind(&slot.kind), words(capability));
    output::print(text.as_bytes())
}
