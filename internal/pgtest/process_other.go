//go:build !unix

package pgtest

import (
	"errors"
	"os"
	"os/exec"
)

// canStart is false where servers cannot be cleaned up reliably; tests then use
// the server named by DEED_TEST_POSTGRES_URL.
const canStart = false

var signals map[string]os.Signal

func unprivileged() (account, error) { return account{}, errors.ErrUnsupported }

func (account) detach(*exec.Cmd) {}
