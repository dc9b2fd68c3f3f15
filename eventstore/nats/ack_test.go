package nats

import (
	"encoding/json"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/deed-go/deed/internal/natsserver"
)

// FuzzPlainAck: what the short way reads is what JSON says.
func FuzzPlainAck(f *testing.F) {
	for _, answer := range []string{
		`{"stream":"deed", "seq":7}`, `{"stream":"deed","seq":7}`, `{"stream":"deed", "seq":0}`, `{"stream":"deed", "seq":+7}`,
		`{"stream":"deed", "seq":07}`, `{"stream":"deed", "seq":18446744073709551615}`, `{"stream":"deed", "seq":18446744073709551616}`,
		`{"stream":"deed", "seq":7,"domain":"hub"}`, `{"stream":"deed", "seq":7, "duplicate": true}`, `{"stream":"other", "seq":7}`,
		`{"error":{"code":400,"err_code":10071},"stream":"deed","seq":0}`, `{"stream":"deed", "seq":}`, `{"stream":"deed", "seq":7e1}`, ``,
	} {
		f.Add([]byte(answer))
	}
	f.Fuzz(func(t *testing.T, answer []byte) {
		sequence, ok := plainAck(answer, "deed")
		if !ok {
			return
		}
		var ack acknowledgement
		require.NoError(t, json.Unmarshal(answer, &ack))
		require.Equal(t, acknowledgement{Stream: "deed", Sequence: sequence}, ack)
		require.Positive(t, sequence)
	})
}

// TestPlainAck_IsWhatTheServerSays: a server that answers otherwise would only
// be slower, in silence.
func TestPlainAck_IsWhatTheServerSays(t *testing.T) {
	t.Parallel()
	replicated(t, func(t *testing.T, c *natsserver.Cluster) {
		store, name := openLog(t, c)
		answer, err := store.conn.Request(name+".0.a.1", nil, store.settings.attempt)
		require.NoError(t, err)
		sequence, ok := plainAck(answer.Data, name)
		require.True(t, ok, string(answer.Data))
		require.Equal(t, uint64(1), sequence)
	})
}
