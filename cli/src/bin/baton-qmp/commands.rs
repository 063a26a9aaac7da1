//! What each command does. Arguments were checked against the table, return values will be.

use baton_ipc::FileAddress;
use baton_ipc::control::Reply;
use baton_ipc::control::Request;
use baton_ipc::control::VmState;
use baton_ipc::control::VmStatus;
use serde_json::Value;
use serde_json::json;

use crate::capability::CAPABILITIES;
use crate::channels;
use crate::channels::Both;
use crate::channels::Place;
use crate::failure::Class;
use crate::failure::Failure;
use crate::introspect;
use crate::machine;
use crate::migration::IN_PROGRESS;
use crate::migration::Mode;
use crate::migration::Status;
use crate::schema::Object;
use crate::shared::Answer;
use crate::shared::Shared;
use crate::table::COMMANDS;

pub(crate) fn qmp_capabilities(_: &mut Shared, _: &Object) -> Answer {
    Answer::failed(Failure::of(
        Class::CommandNotFound,
        "Capabilities negotiation is already complete, command ignored",
    ))
}

pub(crate) fn own_events(_: &mut Shared, arguments: &Object) -> Answer {
    Answer::OwnEvents(arguments.get("enable").and_then(Value::as_bool) == Some(true))
}

pub(crate) fn query_commands(_: &mut Shared, _: &Object) -> Answer {
    Answer::value(
        COMMANDS
            .iter()
            .map(|one| json!({"name": one.name}))
            .collect(),
    )
}

pub(crate) fn query_qmp_schema(_: &mut Shared, _: &Object) -> Answer {
    Answer::value(introspect::schema())
}

pub(crate) fn query_version(_: &mut Shared, _: &Object) -> Answer {
    Answer::value(machine::version())
}

/// Asks how the VM is, and goes on with that.
pub(crate) fn with_status(then: impl FnOnce(&mut Shared, VmStatus) -> Answer + 'static) -> Answer {
    Answer::ask(Request::Status, |shared, reply| match reply {
        Ok(Reply::Status(status)) => then(shared, *status),
        Ok(_) => Answer::failed(Failure::generic("the broker gave another answer")),
        Err(refusal) => Answer::failed(refusal.into()),
    })
}

fn view(show: fn(&VmStatus) -> Value) -> Answer {
    with_status(move |_, status| Answer::value(show(&status)))
}

pub(crate) fn query_status(_: &mut Shared, _: &Object) -> Answer {
    view(machine::status)
}

pub(crate) fn query_cpus_fast(_: &mut Shared, _: &Object) -> Answer {
    view(machine::cpus)
}

pub(crate) fn query_memory_size_summary(_: &mut Shared, _: &Object) -> Answer {
    view(machine::memory)
}

pub(crate) fn query_name(_: &mut Shared, _: &Object) -> Answer {
    view(machine::name)
}

pub(crate) fn query_uuid(_: &mut Shared, _: &Object) -> Answer {
    view(machine::uuid)
}

pub(crate) fn stop(_: &mut Shared, _: &Object) -> Answer {
    with_status(|_, status| match status.state {
        // As in QEMU, a guest that does not run is stopped already.
        VmState::Paused
        | VmState::GuestPanicked
        | VmState::Stopped
        | VmState::Postmigrate
        | VmState::Lost => Answer::done(),
        _ => Answer::order(Request::Pause),
    })
}

pub(crate) fn cont(_: &mut Shared, _: &Object) -> Answer {
    with_status(|_, status| match status.state {
        VmState::Running => Answer::done(),
        VmState::Upgrading if !status.paused => Answer::done(),
        _ => Answer::order(Request::Resume),
    })
}

pub(crate) fn system_reset(_: &mut Shared, _: &Object) -> Answer {
    Answer::order(Request::Reset)
}

pub(crate) fn system_powerdown(_: &mut Shared, _: &Object) -> Answer {
    Answer::order(Request::PowerButton)
}

fn no_balloon() -> Failure {
    Failure::of(
        Class::DeviceNotActive,
        "No balloon device has been activated",
    )
}

pub(crate) fn balloon(_: &mut Shared, arguments: &Object) -> Answer {
    let value = arguments.get("value").and_then(Value::as_i64);
    let bytes = value.and_then(|value| u64::try_from(value).ok());
    with_status(move |_, status| match (status.balloon, bytes) {
        (None, _) => Answer::failed(no_balloon()),
        (_, None | Some(0)) => {
            Answer::failed(Failure::generic("Parameter 'target' expects a size"))
        }
        (Some(_), Some(bytes)) => Answer::order(Request::Balloon { bytes }),
    })
}

pub(crate) fn query_balloon(_: &mut Shared, _: &Object) -> Answer {
    with_status(|_, status| match status.balloon {
        Some(bytes) => Answer::value(json!({"actual": bytes})),
        None => Answer::failed(no_balloon()),
    })
}

pub(crate) fn quit(shared: &mut Shared, _: &Object) -> Answer {
    shared.quit = true;
    Answer::Tell(Request::Stop { force: true })
}

pub(crate) fn query_migrate(_: &mut Shared, _: &Object) -> Answer {
    with_status(|shared, mut status| {
        shared.migration.recall(&mut status);
        Answer::value(shared.migration.info_of(&status))
    })
}

pub(crate) fn query_migrate_parameters(shared: &mut Shared, _: &Object) -> Answer {
    Answer::value(json!({"mode": shared.migration.mode.name()}))
}

pub(crate) fn query_migrate_capabilities(shared: &mut Shared, _: &Object) -> Answer {
    let state = |name: &str| shared.migration.is_enabled(name);
    let all = CAPABILITIES
        .iter()
        .map(|known| json!({"capability": known.0, "state": state(known.0)}));
    Answer::value(all.collect())
}

pub(crate) fn migrate_set_parameters(shared: &mut Shared, arguments: &Object) -> Answer {
    match arguments.get("mode").and_then(Value::as_str) {
        None => Answer::done(),
        // What runs goes on as it was asked for: `migrate` has taken its parameters with it.
        Some(mode) => match parse_mode(mode) {
            Ok(mode) => {
                shared.migration.mode = mode;
                Answer::done()
            }
            Err(failure) => Answer::failed(failure),
        },
    }
}

fn parse_mode(mode: &str) -> Result<Mode, Failure> {
    match mode {
        "normal" => Ok(Mode::Normal),
        "cpr-transfer" => Ok(Mode::CprTransfer),
        "cpr-reboot" => Ok(Mode::CprReboot),
        other => Err(Failure::generic(format_args!(
            "mode '{other}' is not supported by this VMM: use 'cpr-transfer', which replaces the worker under its guest, or 'cpr-reboot', which puts the guest into a file"
        ))),
    }
}

pub(crate) fn migrate_set_capabilities(shared: &mut Shared, arguments: &Object) -> Answer {
    let entries = arguments.get("capabilities").and_then(Value::as_array);
    let wanted = |entry: &Value| {
        let name = entry.get("capability").and_then(Value::as_str)?;
        Some((name.to_owned(), entry.get("state")?.as_bool()?))
    };
    let wanted: Vec<_> = entries.into_iter().flatten().filter_map(wanted).collect();
    let enable = move |shared: &mut Shared| {
        for (name, on) in &wanted {
            shared.migration.enable(name, *on);
        }
        Answer::done()
    };
    if !shared.migration.in_progress() {
        return enable(shared);
    }
    // As in QEMU, what comes in is not this side's migration.
    with_status(move |shared, status| match status.state {
        VmState::Incoming => enable(shared),
        _ => Answer::failed(Failure::generic(IN_PROGRESS)),
    })
}

pub(crate) fn migrate(shared: &mut Shared, arguments: &Object) -> Answer {
    match plan(shared, arguments) {
        Ok(plan) => {
            let hold = shared.migration.is_enabled("pause-before-switchover");
            let leaves = matches!(plan, Plan::Transfer(_));
            let request = match plan {
                Plan::Copy => return why_not(Failure::generic(COPIES)),
                Plan::InPlace => Request::BeginUpgrade { hold },
                Plan::Transfer(Both { main, cpr }) => Request::Transfer {
                    main,
                    cpr,
                    hold,
                    follow: false,
                },
                Plan::Save(file) => Request::Save { file, hold },
            };
            Answer::ask(request, move |shared, reply| match reply {
                Ok(_) => {
                    shared.migration.leaves = leaves;
                    Answer::done()
                }
                Err(_) if shared.migration.in_progress() => why_not(Failure::generic(IN_PROGRESS)),
                Err(refusal) => why_not(refusal.into()),
            })
        }
        Err(failure) if shared.migration.in_progress() => why_not(failure),
        Err(failure) => Answer::failed(failure),
    }
}

/// A refusal of `migrate`: in QEMU's words where the VM's state is the reason.
fn why_not(failure: Failure) -> Answer {
    with_status(move |_, status| {
        Answer::failed(match status.state {
            VmState::Incoming => Failure::generic("Guest is waiting for an incoming migration"),
            VmState::Postmigrate => {
                Failure::generic("Can't migrate the vm that was paused due to previous migration")
            }
            _ => failure,
        })
    })
}

/// Mode `normal`, to which clients come by leaving the mode as it is.
const COPIES: &str = "mode 'normal', which copies RAM, is not supported by this VMM: set mode 'cpr-transfer' or 'cpr-reboot'";

/// What a `migrate` comes to.
enum Plan {
    /// What this VMM does not do.
    Copy,
    InPlace,
    Transfer(Both),
    Save(FileAddress),
}

/// What is wrong with a `migrate`, in the order in which QEMU looks.
fn plan(shared: &Shared, arguments: &Object) -> Result<Plan, Failure> {
    let migration = &shared.migration;
    let in_place = migration.mode == Mode::CprTransfer;
    let channels = arguments.get("channels").and_then(Value::as_array);
    let channels = channels.map(Vec::as_slice);
    let uri = arguments.contains_key("uri");
    let resume = arguments.get("resume").and_then(Value::as_bool);
    if uri == channels.is_some() && (uri || !in_place) {
        return Err(Failure::generic("need either 'uri' or 'channels' argument"));
    }
    if let Some(channels) = channels {
        channels::count(channels)?;
    }
    let has_cpr = channels.is_some_and(channels::has_cpr);
    if in_place && (uri || channels.is_some()) && !has_cpr {
        return Err(Failure::generic("missing 'cpr' migration channel"));
    }
    let plan = match (migration.mode, channels) {
        (Mode::CprTransfer, Some(channels)) => Plan::Transfer(channels::both(channels)?),
        (Mode::CprTransfer, None) => Plan::InPlace,
        (Mode::CprReboot, _) => Plan::Save(channels::file(arguments)?),
        (Mode::Normal, _) => Plan::Copy,
    };
    if resume == Some(true) {
        return Err(Failure::generic(
            "Cannot resume if there is no paused migration",
        ));
    }
    migration.check()?;
    Ok(plan)
}

pub(crate) fn migrate_cancel(shared: &mut Shared, _: &Object) -> Answer {
    if !shared.migration.in_progress() {
        // As in QEMU: whoever cancels what has ended meanwhile has nothing to mend.
        return Answer::done();
    }
    Answer::ask(Request::Cancel, |shared, reply| match reply {
        Err(refusal) if shared.migration.in_progress() => Answer::failed(refusal.into()),
        _ => Answer::done(),
    })
}

pub(crate) fn migrate_continue(shared: &mut Shared, arguments: &Object) -> Answer {
    let expected = arguments.get("state").and_then(Value::as_str);
    let state = shared.migration.status().map_or("none", Status::name);
    if expected != Some(state) || state != "pre-switchover" {
        return Answer::failed(Failure::generic(format_args!(
            "Migration not in expected state: {state}"
        )));
    }
    Answer::order(Request::Continue)
}

pub(crate) fn query_block(_: &mut Shared, _: &Object) -> Answer {
    view(machine::block)
}

pub(crate) fn migrate_incoming(shared: &mut Shared, arguments: &Object) -> Answer {
    match channels::incoming(arguments) {
        Ok(Place::Socket(main)) => Answer::order(Request::Incoming { main }),
        Ok(Place::File(file)) if shared.migration.mode == Mode::CprTransfer => {
            let text = format!(
                "Migration requires streamable transport (eg unix), and {} is a file",
                file.path
            );
            Answer::failed(Failure::generic(text))
        }
        Ok(Place::File(file)) => Answer::order(Request::Restore { file }),
        // As in QEMU, where nothing is awaited that is what is wrong.
        Err(failure) => with_status(|_, status| match status.state {
            VmState::Incoming => Answer::failed(failure),
            _ => Answer::failed(Failure::generic(
                "'-incoming' was not specified on the command line",
            )),
        }),
    }
}

pub(crate) fn query_yank(shared: &mut Shared, _: &Object) -> Answer {
    let all: Vec<Value> = shared
        .migration
        .in_progress()
        .then(|| json!({"type": "migration"}))
        .into_iter()
        .collect();
    Answer::value(Value::Array(all))
}

pub(crate) fn yank(shared: &mut Shared, arguments: &Object) -> Answer {
    let instances = arguments.get("instances").and_then(Value::as_array);
    let count = instances.map_or(0, Vec::len);
    if count == 0 {
        return Answer::done();
    }
    if !shared.migration.in_progress() {
        return Answer::failed(Failure::of(Class::DeviceNotFound, "Instance not found"));
    }
    Answer::order(Request::Cancel)
}
