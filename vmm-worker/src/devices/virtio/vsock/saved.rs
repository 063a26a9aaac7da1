//! The saved state: every connection, with what is under way in it. Version 1, in the transport's section.

use std::collections::BTreeMap;
use std::collections::BTreeSet;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use baton_ipc::worker::MAX_VSOCK_CONNECTIONS;
use baton_ipc::worker::VSOCK_CREDIT;
use serde::Deserialize;
use serde::Serialize;

use super::connection::Connection;
use super::connection::Owed;
use super::connection::Ports;
use super::connection::Socket;
use super::connection::Stage;
use super::table::FIRST_HOST_PORT;
use super::table::MAX_RESETS;
use super::table::Reset;
use super::table::Table;
use crate::devices::state::StateError;

/// The most refusals that can be owed: the driver's, and one of each connection.
pub(super) const MOST_RESETS: usize = 2 * MAX_RESETS + MAX_VSOCK_CONNECTIONS as usize;

#[derive(Debug, Serialize, Deserialize)]
pub(super) struct SavedVsock {
    pub(super) cid: u32,
    pub(super) next_ticket: u32,
    pub(super) next_port: u32,
    pub(super) connections: Vec<SavedConnection>,
    pub(super) resets: Vec<SavedReset>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct SavedConnection {
    pub(super) ports: Ports,
    pub(super) stage: SavedStage,
    pub(super) held: Vec<u8>,
    pub(super) freed: u32,
    pub(super) told: u32,
    pub(super) sent: u32,
    pub(super) guest_room: u32,
    pub(super) guest_freed: u32,
    pub(super) guest_sent_all: bool,
    pub(super) guest_deaf: bool,
    pub(super) host_sent_all: bool,
    pub(super) host_deaf: bool,
    pub(super) ended: bool,
    pub(super) owes_request: bool,
    pub(super) owes_response: bool,
    pub(super) owes_credit: bool,
    pub(super) owes_shutdown: bool,
}

/// How far a connection is, with the ticket that it was asked for by or the id of its socket.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(super) enum SavedStage {
    Asked(u32),
    Abandoned(u32),
    Offered(u32),
    Open(u32),
}

#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(super) struct SavedReset {
    pub(super) cid: u64,
    pub(super) kind: u16,
    pub(super) ports: Ports,
}

impl SavedVsock {
    pub(super) fn of(table: &Table) -> Self {
        Self {
            cid: table.cid,
            next_ticket: table.next_ticket,
            next_port: table.next_port,
            connections: table
                .connections
                .iter()
                .filter_map(|(ports, connection)| SavedConnection::of(*ports, connection))
                .collect(),
            resets: table
                .resets
                .iter()
                .map(|Reset { cid, kind, ports }| SavedReset {
                    cid: *cid,
                    kind: *kind,
                    ports: *ports,
                })
                .collect(),
        }
    }

    /// The connections, on sockets that were handed over.
    pub(super) fn restore(
        self,
        own: u32,
        sockets: &BTreeMap<u32, Arc<OwnedFd>>,
    ) -> Result<Table, StateError> {
        let Self {
            cid,
            next_ticket,
            next_port,
            connections,
            resets,
        } = self;
        if cid != own {
            return Err(StateError::field("cid", cid, "not that of this device"));
        }
        if next_port >> 30 != FIRST_HOST_PORT >> 30 {
            return Err(StateError::field("next_port", next_port, "not a host's"));
        }
        let many = |field, count: usize, most: usize| match count {
            count if count > most => Err(StateError::field(
                field,
                count as u64,
                "more than there can be",
            )),
            _ => Ok(()),
        };
        many(
            "connections",
            connections.len(),
            MAX_VSOCK_CONNECTIONS as usize,
        )?;
        many("resets", resets.len(), MOST_RESETS)?;
        let mut table = Table::new(own);
        (table.next_ticket, table.next_port) = (next_ticket, next_port);
        let mut tickets = BTreeSet::new();
        let mut ids = BTreeSet::new();
        for saved in connections {
            let (names, name) = match saved.stage {
                SavedStage::Asked(ticket) | SavedStage::Abandoned(ticket) => (&mut tickets, ticket),
                SavedStage::Offered(id) | SavedStage::Open(id) => (&mut ids, id),
            };
            if !names.insert(name) {
                return Err(StateError::field("stage", name, "another connection's too"));
            }
            let ports = saved.ports;
            let connection = saved.restore(sockets)?;
            if table.connections.insert(ports, connection).is_some() {
                return Err(StateError::field("ports", ports.0, "another connection's"));
            }
        }
        table.resets = resets
            .into_iter()
            .map(|SavedReset { cid, kind, ports }| Reset { cid, kind, ports })
            .collect();
        Ok(table)
    }
}

impl SavedConnection {
    /// None for one that has no socket where it should: there is no such.
    fn of(ports: Ports, connection: &Connection) -> Option<Self> {
        let Connection {
            stage,
            socket,
            held,
            freed,
            told,
            sent,
            guest_room,
            guest_freed,
            guest_sent_all,
            guest_deaf,
            host_sent_all,
            host_deaf,
            ended,
            owed,
            // Found out anew.
            readable: _,
        } = connection;
        let Owed {
            request,
            response,
            credit,
            shutdown,
        } = *owed;
        let id = socket.as_ref().map(|socket| socket.id);
        Some(Self {
            ports,
            stage: match stage {
                Stage::Asked(ticket) => SavedStage::Asked(*ticket),
                Stage::Abandoned(ticket) => SavedStage::Abandoned(*ticket),
                Stage::Offered => SavedStage::Offered(id?),
                Stage::Open => SavedStage::Open(id?),
            },
            held: held.iter().copied().collect(),
            freed: *freed,
            told: *told,
            sent: *sent,
            guest_room: *guest_room,
            guest_freed: *guest_freed,
            guest_sent_all: *guest_sent_all,
            guest_deaf: *guest_deaf,
            host_sent_all: *host_sent_all,
            host_deaf: *host_deaf,
            ended: *ended,
            owes_request: request,
            owes_response: response,
            owes_credit: credit,
            owes_shutdown: shutdown,
        })
    }

    fn restore(self, sockets: &BTreeMap<u32, Arc<OwnedFd>>) -> Result<Connection, StateError> {
        let Self {
            ports: _,
            stage,
            held,
            freed,
            told,
            sent,
            guest_room,
            guest_freed,
            guest_sent_all,
            guest_deaf,
            host_sent_all,
            host_deaf,
            ended,
            owes_request,
            owes_response,
            owes_credit,
            owes_shutdown,
        } = self;
        let socket = |id: u32| match sockets.get(&id) {
            Some(fd) => Ok(Some(Socket {
                id,
                fd: Arc::clone(fd),
            })),
            None => Err(StateError::field(
                "id",
                id,
                "no socket that was handed over",
            )),
        };
        let (stage, socket) = match stage {
            SavedStage::Asked(ticket) => (Stage::Asked(ticket), None),
            SavedStage::Abandoned(ticket) => (Stage::Abandoned(ticket), None),
            SavedStage::Offered(id) => (Stage::Offered, socket(id)?),
            SavedStage::Open(id) => (Stage::Open, socket(id)?),
        };
        if held.len() > VSOCK_CREDIT as usize || (stage != Stage::Open && !held.is_empty()) {
            return Err(StateError::field(
                "held",
                held.len() as u64,
                "more than the guest may have sent",
            ));
        }
        if ended && (!guest_sent_all || !held.is_empty()) {
            return Err(StateError::field("ended", true, "before the guest's end"));
        }
        if owes_request && stage != Stage::Offered {
            return Err(StateError::field("owes_request", true, "to nobody"));
        }
        if (owes_response || owes_shutdown || owes_credit) && stage != Stage::Open {
            return Err(StateError::field(
                "owes",
                true,
                "before there is a connection",
            ));
        }
        Ok(Connection {
            stage,
            socket,
            held: held.into(),
            freed,
            told,
            sent,
            guest_room,
            guest_freed,
            guest_sent_all,
            guest_deaf,
            host_sent_all,
            host_deaf,
            ended,
            owed: Owed {
                request: owes_request,
                response: owes_response,
                credit: owes_credit,
                shutdown: owes_shutdown,
            },
            readable: true,
        })
    }
}
