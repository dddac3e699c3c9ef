//! A client that speaks the protocol by hand, over the agent's own TLS: what an agent never says, a test can.

use std::fs;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use bytes::BytesMut;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};
use strandline_actors::runtime::transport::hello;
use strandline_agent::identity::{Store, client_config};
use strandline_agent::keys::{Keyset, SlotSecret, load_key_file, unlock};
use strandline_messages::format::repository::RepositoryV1;
use strandline_messages::identity::AuthorityHash;
use strandline_messages::wire::message::kinds;
use strandline_messages::wire::{BlockFrame, Frame, FrameDecoder, Message, OpenSession, Purpose, SessionKind, Tag};
use strandline_messages::{RepositoryName, SessionId, limits};

use crate::rig::Agent;

/// Longest silence in which an answer is still waited for.
pub const SILENCE: Duration = Duration::from_secs(90);

/// What came from the server.
#[derive(Clone, Debug, PartialEq)]
pub enum Heard {
    /// A message with its tag.
    Message(Tag, Message),
    /// A block.
    Block(BlockFrame),
    /// The connection is over, and how.
    End(String),
}

/// One connection.
pub struct Raw {
    tls: StreamOwned<ClientConnection, Recorder>,
    buffer: BytesMut,
    decoder: FrameDecoder,
    /// What proofs on this connection sign: the nonce of the server's `Hello`, bound to its authority.
    pub nonce: [u8; 32],
}

/// A socket that remembers what was written into it.
struct Recorder {
    socket: TcpStream,
    sent: Vec<u8>,
}

impl Read for Recorder {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.socket.read(buffer)
    }
}

impl Write for Recorder {
    #[expect(clippy::disallowed_methods, reason = "this is one write handed on, and its caller sees how much it took")]
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let written = self.socket.write(bytes)?;
        self.sent.extend_from_slice(bytes.get(..written).unwrap_or_default());
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.socket.flush()
    }
}

impl Raw {
    /// Connects. The handshake is made with the first byte that is written or read.
    pub fn connect(address: SocketAddr, config: &Arc<ClientConfig>) -> Result<Self> {
        let socket = TcpStream::connect(address)?;
        socket.set_nodelay(true)?;
        socket.set_read_timeout(Some(SILENCE))?;
        socket.set_write_timeout(Some(SILENCE))?;
        let connection = ClientConnection::new(Arc::clone(config), ServerName::from(address.ip()))?;
        let tls = StreamOwned::new(connection, Recorder { socket, sent: Vec::new() });
        Ok(Self { tls, buffer: BytesMut::new(), decoder: FrameDecoder::default(), nonce: [0; 32] })
    }

    /// Connects and greets; an error if the server does not greet back.
    pub fn greeted(address: SocketAddr, config: &Arc<ClientConfig>, purpose: Purpose) -> Result<Self> {
        let mut raw = Self::connect(address, config)?;
        match raw.greet(purpose)? {
            Heard::Message(_, Message::Hello(_)) => Ok(raw),
            other => bail!("the server does not greet: {other:?}"),
        }
    }

    /// Says `Hello`; what comes back.
    pub fn greet(&mut self, purpose: Purpose) -> Result<Heard> {
        self.say(Tag(0), &Message::Hello(hello(purpose, [0; 32])))?;
        let heard = self.hear()?;
        if let Heard::Message(_, Message::Hello(hello)) = &heard {
            self.note_nonce(&hello.nonce)?;
        }
        Ok(heard)
    }

    /// Notes the nonce of the server's `Hello`, bound to the authority whose certificate it has sent.
    pub fn note_nonce(&mut self, nonce: &[u8; 32]) -> Result<()> {
        let chain = self.tls.conn.peer_certificates().context("no certificates")?;
        self.nonce = AuthorityHash::of(chain.last().context("no authority")?).bind(nonce);
        Ok(())
    }

    /// Sends a message. That the server has closed shows with what is heard.
    pub fn say(&mut self, tag: Tag, message: &Message) -> Result<()> {
        self.send(&message.to_frame(tag)?)
    }

    /// Sends a frame, whatever is in it.
    pub fn send(&mut self, frame: &Frame) -> Result<()> {
        self.send_bytes(&frame.encode())
    }

    /// Sends any bytes.
    pub fn send_bytes(&mut self, bytes: &[u8]) -> Result<()> {
        match self.tls.write_all(bytes).and_then(|()| self.tls.flush()) {
            Err(error) if is_silence(&error) => Err(error).context("the server does not take what is sent"),
            _ => Ok(()),
        }
    }

    /// The next thing that comes from the server; an error if nothing comes for [`SILENCE`].
    pub fn hear(&mut self) -> Result<Heard> {
        loop {
            if let Some(frame) = self.decoder.next(&mut self.buffer)? {
                if frame.kind == kinds::BLOCK {
                    return Ok(Heard::Block(BlockFrame::from_frame(frame)?));
                }
                let (tag, message) = Message::decode(&frame)?;
                return Ok(Heard::Message(tag, message));
            }
            let mut piece = [0; 16 << 10];
            match self.tls.read(&mut piece) {
                Ok(0) => return Ok(Heard::End("closed in good order".into())),
                Ok(n) => self.buffer.extend_from_slice(piece.get(..n).unwrap_or_default()),
                Err(error) if is_silence(&error) => return Err(error).context("the server says nothing"),
                Err(error) => return Ok(Heard::End(error.to_string())),
            }
        }
    }

    /// Asks and waits for the answer with that tag, or for the end.
    pub fn ask(&mut self, tag: Tag, message: &Message) -> Result<Heard> {
        self.say(tag, message)?;
        self.answer(tag)
    }

    /// The next thing with this tag, or the end.
    pub fn answer(&mut self, tag: Tag) -> Result<Heard> {
        loop {
            match self.hear()? {
                Heard::Message(found, message) if found == tag => return Ok(Heard::Message(found, message)),
                Heard::End(how) => return Ok(Heard::End(how)),
                _ => {}
            }
        }
    }

    /// Opens a session on a greeted control connection.
    pub fn open(&mut self, kind: SessionKind, repository: &RepositoryName, keys: &Keyset) -> Result<Message> {
        let request = self.open_request(kind, repository, None, keys)?;
        match self.ask(Tag(1), &Message::OpenSession(request))? {
            Heard::Message(_, answer) => Ok(answer),
            other => bail!("no answer to OpenSession: {other:?}"),
        }
    }

    /// An `OpenSession` with the proof for this connection.
    pub fn open_request(
        &self,
        kind: SessionKind,
        repository: &RepositoryName,
        resume_of: Option<SessionId>,
        keys: &Keyset,
    ) -> Result<OpenSession> {
        Ok(OpenSession {
            kind,
            repository: repository.clone(),
            resume_of,
            writer: keys.encoded_certificate().into(),
            proof: keys.sign_session_proof(&self.nonce)?.to_vec().into(),
        })
    }

    /// Every byte that went into the socket so far, TLS records as they are.
    pub fn sent(&self) -> &[u8] {
        &self.tls.sock.sent
    }

    /// Sends close_notify and closes the socket.
    pub fn close(mut self) {
        self.tls.conn.send_close_notify();
        // The server may have closed before.
        let _ = self.tls.flush();
    }
}

fn is_silence(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut)
}

/// TLS as an enrolled agent has it.
pub fn papers_of(agent: &Agent, address: SocketAddr) -> Result<Arc<ClientConfig>> {
    Ok(client_config(&Store::new(&agent.config(), address.to_string().parse()?).load()?)?)
}

/// TLS that believes the authority of `agent`'s server and shows no certificate.
pub fn no_papers(agent: &Agent, address: SocketAddr) -> Result<Arc<ClientConfig>> {
    let config = trusting(&identity_file(agent, address, "ca.crt")?)?.with_no_client_auth();
    let product = papers_of(agent, address)?;
    Ok(alike(config, &product))
}

/// TLS that shows `certificate` for the key of `agent`.
pub fn other_papers(
    agent: &Agent,
    address: SocketAddr,
    certificate: CertificateDer<'static>,
) -> Result<Arc<ClientConfig>> {
    let key = PrivateKeyDer::from_pem_slice(&identity_file(agent, address, "client.key")?)
        .map_err(|error| anyhow::anyhow!("client.key: {error}"))?;
    let config = trusting(&identity_file(agent, address, "ca.crt")?)?.with_client_auth_cert(vec![certificate], key)?;
    let product = papers_of(agent, address)?;
    Ok(alike(config, &product))
}

/// The same with other application protocols.
pub fn speaking(config: &ClientConfig, protocols: &[&[u8]]) -> Arc<ClientConfig> {
    let mut config = config.clone();
    config.alpn_protocols = protocols.iter().map(|name| name.to_vec()).collect();
    Arc::new(config)
}

fn identity_file(agent: &Agent, address: SocketAddr, name: &str) -> Result<Vec<u8>> {
    let path = Store::new(&agent.config(), address.to_string().parse()?).directory().join(name);
    fs::read(&path).with_context(|| path.display().to_string())
}

fn trusting(authority: &[u8]) -> Result<rustls::ConfigBuilder<ClientConfig, rustls::client::WantsClientCert>> {
    let mut roots = RootCertStore::empty();
    let authority = CertificateDer::from_pem_slice(authority).map_err(|error| anyhow::anyhow!("ca.crt: {error}"))?;
    roots.add(authority)?;
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let builder = ClientConfig::builder_with_provider(provider).with_protocol_versions(&[&rustls::version::TLS13])?;
    Ok(builder.with_root_certificates(roots))
}

/// `config` with everything but its certificates as the product sets it.
fn alike(mut config: ClientConfig, product: &ClientConfig) -> Arc<ClientConfig> {
    config.alpn_protocols.clone_from(&product.alpn_protocols);
    config.resumption = product.resumption.clone();
    config.enable_early_data = product.enable_early_data;
    Arc::new(config)
}

/// The only repository of `tenant` that is called `name` in a server's data directory: its public file and its slots.
pub fn repository_on_disk(data: &Path, tenant: &str, name: &str) -> Result<(RepositoryV1, Vec<Vec<u8>>)> {
    for entry in fs::read_dir(data.join("storage").join(tenant))? {
        let home = entry?.path();
        let Ok(file) = fs::read(home.join("REPOSITORY")) else { continue };
        let file = RepositoryV1::decode(&file)?;
        if file.name.as_str() == name {
            let read_slot = |entry: io::Result<fs::DirEntry>| Ok(fs::read(entry?.path())?);
            return Ok((file, fs::read_dir(home.join("keys"))?.map(read_slot).collect::<Result<_>>()?));
        }
    }
    bail!("no repository {tenant}/{name} in {}", data.display())
}

/// What the key files of `agent` open.
pub fn keys_of(agent: &Agent, repository: &RepositoryV1, slots: &[Vec<u8>]) -> Result<Keyset> {
    let mut secrets = Vec::new();
    for entry in fs::read_dir(agent.config().join("keys"))? {
        secrets.push(SlotSecret::KeyFile(*load_key_file(&entry?.path())?.context("no key file")?));
    }
    ensure!(secrets.len() <= limits::KEY_SLOTS_MAX, "too many key files");
    Ok(unlock(slots, &secrets, repository)?.keyset)
}
