package mailbox

import (
	"bytes"
	"fmt"
	"io"
	"path/filepath"
	"testing"

	"github.com/emersion/go-smtp"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// TestMailbox_KeepsNothingItCannotRead: what is no mail is refused by SMTP.
func TestMailbox_KeepsNothingItCannotRead(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	var out bytes.Buffer
	inbox, err := Start(dir, &out)
	require.NoError(t, err)
	defer func() { require.NoError(t, inbox.Close()) }()
	client, err := smtp.Dial(fmt.Sprintf("127.0.0.1:%d", inbox.Port))
	require.NoError(t, err)
	defer client.Close()
	err = client.SendMail("a@example.com", []string{"b@example.com"}, bytes.NewReader([]byte("no header")))
	require.Error(t, err)
	names, err := filepath.Glob(filepath.Join(dir, "*"))
	require.NoError(t, err)
	require.Empty(t, names)
}

// Also before the server has heard of its listener.
func TestClose_AtOnce(t *testing.T) {
	t.Parallel()
	for range 20 {
		m, err := Start(t.TempDir(), io.Discard)
		require.NoError(t, err)
		require.NoError(t, m.Close())
	}
}
