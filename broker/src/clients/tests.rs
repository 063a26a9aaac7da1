use super::*;

/// Nobody that a policy without `[[access]]` knows.
const OTHER: u32 = 65_200;

struct Fixture {
    clients: Clients,
    policy: Policy,
    path: std::path::PathBuf,
    _directory: tempfile::TempDir,
}

impl Fixture {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let (path, policy) = (directory.path().join("socket"), Policy::builtin().unwrap());
        Self {
            clients: Clients::listen(&path, &policy).unwrap(),
            policy,
            path,
            _directory: directory,
        }
    }

    /// Somebody at the door, who does not wait there when nobody can.
    fn knock(&self) -> OwnedFd {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let kind = SocketType::SEQPACKET;
        let socket = rustix::net::socket_with(AddressFamily::UNIX, kind, flags, None).unwrap();
        rustix::net::connect(&socket, &SocketAddrUnix::new(&self.path).unwrap()).unwrap();
        socket
    }

    /// A user's connection.
    fn admitted(&mut self, user: u32) -> Channel<Request, Reply> {
        let (own, theirs) = FdSocket::pair().unwrap();
        let actor = Actor {
            uid: user,
            pid: 1,
            unit: None,
        };
        self.clients.greet(own, actor, Vec::new(), false);
        Channel::new(theirs)
    }

    /// Who is heard in one turn.
    fn turn(&mut self) -> Vec<u64> {
        self.clients.begin_turn();
        std::iter::from_fn(|| self.clients.hear(Running, &self.policy))
            .map(|asked| asked.client)
            .collect()
    }
}

#[test]
fn each_client_is_heard_once_in_a_turn() {
    let mut fixture = Fixture::new();
    let all = [0, OTHER, 0].map(|user| fixture.admitted(user));
    for client in &all {
        for _ in 0..5 {
            client.send(&Request::LogHead).unwrap();
        }
    }
    for turn in 1..=5 {
        assert_eq!(fixture.turn(), [1, 3], "{turn}");
        // What is denied is to be written down before there is more of it.
        assert_eq!(
            std::mem::take(&mut fixture.clients.denied).len(),
            1,
            "{turn}"
        );
    }
    assert!(fixture.turn().is_empty());
}

#[test]
fn those_at_the_door_come_in_a_few_at_a_time_and_one_by_one_in_a_pause() {
    let mut fixture = Fixture::new();
    // As many as the kernel lets wait (listen(2)).
    let _waiting: Vec<_> = (0..=ARRIVALS).map(|_| fixture.knock()).collect();
    assert_eq!(fixture.clients.cancels(&fixture.policy), None);
    assert_eq!(fixture.clients.clients.len(), 1);
    fixture.clients.accept(&fixture.policy);
    assert_eq!(fixture.clients.clients.len(), ARRIVALS + 1);
}

#[test]
fn nobody_takes_the_last_place_of_root() {
    let mut fixture = Fixture::new();
    let mut held = Vec::new();
    for user in OTHER..OTHER + 4 {
        for _ in 0..MAX_OF_ONE {
            if fixture.clients.has_room_for(user) {
                held.push(fixture.admitted(user));
            }
        }
        assert!(!fixture.clients.has_room_for(user), "{user}");
    }
    assert_eq!(held.len(), MAX_OTHERS);
    while fixture.clients.has_room_for(0) {
        held.push(fixture.admitted(0));
    }
    assert_eq!(held.len(), MAX_CLIENTS);
}
