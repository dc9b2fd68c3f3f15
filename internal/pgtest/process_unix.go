//go:build unix

package pgtest

import (
	"errors"
	"os"
	"os/exec"
	"os/user"
	"strconv"
	"syscall"
)

const canStart = true

// signals are the server's modes of stopping.
var signals = map[string]os.Signal{
	"smart":     syscall.SIGTERM,
	"fast":      syscall.SIGINT,
	"immediate": syscall.SIGQUIT,
	"kill":      syscall.SIGKILL,
}

// unprivileged returns the account for servers: ours, or another if we are root.
func unprivileged() (account, error) {
	if os.Geteuid() != 0 {
		return account{}, nil
	}
	for _, name := range []string{"postgres", "nobody"} {
		found, err := user.Lookup(name)
		if err != nil {
			continue
		}
		uid, err1 := strconv.Atoi(found.Uid)
		gid, err2 := strconv.Atoi(found.Gid)
		return account{name: name, uid: uid, gid: gid, other: true}, errors.Join(err1, err2)
	}
	return account{}, errors.New("PostgreSQL does not run as root, and there is no user \"postgres\" or \"nobody\": create one, or run the tests as another user")
}

func (a account) detach(cmd *exec.Cmd) {
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if a.other {
		cmd.SysProcAttr.Credential = &syscall.Credential{Uid: uint32(a.uid), Gid: uint32(a.gid)}
	}
}
