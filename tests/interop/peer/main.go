// Command peer is the other end of the interoperability tests: containerd's own ttrpc, and containerd's own messages.
//
//	peer serve SOCKET   serve until standard input ends
//	peer call SOCKET    call a server of the tests, and say what came back, one JSON object per line
package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/containerd/containerd/api/runtime/task/v2"
	tasktypes "github.com/containerd/containerd/api/types/task"
	"github.com/containerd/ttrpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/emptypb"
	"google.golang.org/protobuf/types/known/timestamppb"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

const namespaceKey = "containerd-namespace-ttrpc"

// By hand: containerd's package for it brings all of gRPC, which takes longer to compile than all the rest.
const streaming = "containerd.services.streaming.v1.Streaming"

var bothWays = ttrpc.StreamDesc{StreamingClient: true, StreamingServer: true}

func main() {
	if len(os.Args) != 3 {
		fail(errors.New("usage: peer serve|call SOCKET"))
	}
	switch os.Args[1] {
	case "serve":
		fail(serve(os.Args[2]))
	case "call":
		fail(call(os.Args[2]))
	}
}

func fail(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

// The server.

func serve(path string) error {
	listener, err := net.Listen("unix", path)
	if err != nil {
		return err
	}
	server, err := ttrpc.NewServer()
	if err != nil {
		return err
	}
	task.RegisterTTRPCTaskService(server, &tasks{killed: make(chan struct{})})
	server.RegisterService(streaming, &ttrpc.ServiceDesc{Streams: map[string]ttrpc.Stream{
		"Stream": {Handler: echoed, StreamingClient: true, StreamingServer: true},
	}})
	server.RegisterService("interop.Streams", &ttrpc.ServiceDesc{Streams: map[string]ttrpc.Stream{
		"Concat": {Handler: concat, StreamingClient: true},
		"Count":  {Handler: count, StreamingServer: true},
	}})
	fmt.Println("ready")
	go func() {
		_, _ = io.Copy(io.Discard, os.Stdin)
		_ = server.Close()
	}()
	if err := server.Serve(context.Background(), listener); !errors.Is(err, ttrpc.ErrServerClosed) {
		return err
	}
	return nil
}

type tasks struct {
	task.TTRPCTaskService // whatever is not below panics
	once                  sync.Once
	killed                chan struct{}
}

func (t *tasks) State(ctx context.Context, r *task.StateRequest) (*task.StateResponse, error) {
	namespace, _ := ttrpc.GetMetadataValue(ctx, namespaceKey)
	return &task.StateResponse{
		ID: r.ID, Bundle: namespace, Pid: 4242, Status: tasktypes.Status_RUNNING, Terminal: true,
		ExitedAt: timestamppb.New(time.Unix(1700000000, 250000000)),
	}, nil
}

func (t *tasks) Create(ctx context.Context, r *task.CreateTaskRequest) (*task.CreateTaskResponse, error) {
	text := fmt.Sprintf("%s %s %d %s %s", r.ID, r.Bundle, len(r.Rootfs), strings.Join(r.Rootfs[0].Options, ","), r.Options.TypeUrl)
	if text != "web /run/web 1 a,b containerd.runc.v1.Options" {
		return nil, status.Error(codes.InvalidArgument, text)
	}
	return &task.CreateTaskResponse{Pid: 7}, nil
}

func (t *tasks) Delete(ctx context.Context, r *task.DeleteRequest) (*task.DeleteResponse, error) {
	return nil, status.Errorf(codes.NotFound, "no container %q", r.ID)
}

func (t *tasks) Wait(ctx context.Context, r *task.WaitRequest) (*task.WaitResponse, error) {
	select {
	case <-t.killed:
		return &task.WaitResponse{ExitStatus: 137}, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

func (t *tasks) Kill(ctx context.Context, r *task.KillRequest) (*emptypb.Empty, error) {
	t.once.Do(func() { close(t.killed) })
	return &emptypb.Empty{}, nil
}

func (t *tasks) Checkpoint(ctx context.Context, r *task.CheckpointTaskRequest) (*emptypb.Empty, error) {
	time.Sleep(200 * time.Millisecond) // later than anybody waits
	return &emptypb.Empty{}, nil
}

func (t *tasks) Exec(ctx context.Context, r *task.ExecProcessRequest) (*emptypb.Empty, error) {
	if len(r.Spec.Value) != 3<<20 {
		return nil, status.Errorf(codes.InvalidArgument, "%d bytes", len(r.Spec.Value))
	}
	return &emptypb.Empty{}, nil
}

func echoed(ctx context.Context, stream ttrpc.StreamServer) (any, error) {
	for {
		message := &anypb.Any{}
		if err := stream.RecvMsg(message); errors.Is(err, io.EOF) {
			return nil, nil
		} else if err != nil {
			return nil, err
		}
		if message.TypeUrl == "fail" {
			return nil, status.Error(codes.FailedPrecondition, string(message.Value))
		}
		if err := stream.SendMsg(message); err != nil {
			return nil, err
		}
	}
}

func concat(ctx context.Context, stream ttrpc.StreamServer) (any, error) {
	var all []byte
	for {
		message := &anypb.Any{}
		if err := stream.RecvMsg(message); errors.Is(err, io.EOF) {
			return &anypb.Any{Value: all}, nil
		} else if err != nil {
			return nil, err
		}
		all = append(all, message.Value...)
	}
}

func count(ctx context.Context, stream ttrpc.StreamServer) (any, error) {
	upto := &anypb.Any{}
	if err := stream.RecvMsg(upto); err != nil {
		return nil, err
	}
	for _, b := range upto.Value {
		if err := stream.SendMsg(&anypb.Any{Value: []byte{b}}); err != nil {
			return nil, err
		}
	}
	return nil, nil
}

// The client.

func call(path string) error {
	conn, err := net.Dial("unix", path)
	if err != nil {
		return err
	}
	client := ttrpc.NewClient(conn)
	defer client.Close()
	tasks := task.NewTTRPCTaskClient(client)
	ctx := ttrpc.WithMetadata(context.Background(), ttrpc.MD{namespaceKey: {"k8s.io"}})

	state, err := tasks.State(ctx, &task.StateRequest{ID: "web"})
	say("state", err, map[string]any{
		"id": state.GetID(), "pid": state.GetPid(), "bundle": state.GetBundle(), "status": state.GetStatus().String(),
		"exited": state.GetExitedAt().AsTime().Format(time.RFC3339Nano),
	})
	_, err = tasks.Delete(ctx, &task.DeleteRequest{ID: "web"})
	say("not found", err, nil)
	_, err = tasks.State(context.Background(), &task.StateRequest{ID: "web"})
	say("no namespace", err, nil)
	_, err = tasks.Pause(ctx, &task.PauseRequest{ID: "web"})
	say("unimplemented", err, nil)
	err = client.Call(ctx, "containerd.task.v2.Task", "State", wrapperspb.Int64(7), &task.StateResponse{})
	say("invalid", err, nil)
	_, err = tasks.Resume(ctx, &task.ResumeRequest{ID: "web"})
	say("internal", err, nil)
	stats, err := tasks.Stats(ctx, &task.StatsRequest{ID: "big"})
	say("big reply", err, map[string]any{"bytes": len(stats.GetStats().GetValue())})
	_, err = tasks.Stats(ctx, &task.StatsRequest{ID: "too big"})
	say("too big reply", err, nil)

	var waits sync.WaitGroup
	codesOfWaits := make([]uint32, 50)
	for i := range codesOfWaits {
		waits.Add(1)
		go func() {
			defer waits.Done()
			response, err := tasks.Wait(ctx, &task.WaitRequest{ID: "web"})
			if err == nil {
				codesOfWaits[i] = response.ExitStatus
			}
		}()
	}
	hurried, cancel := context.WithTimeout(ctx, 50*time.Millisecond)
	_, err = tasks.Wait(hurried, &task.WaitRequest{ID: "web"})
	say("deadline", err, nil)
	cancel()
	_, err = tasks.Kill(ctx, &task.KillRequest{ID: "web", Signal: 9})
	say("kill", err, nil)
	waits.Wait()
	say("waits", nil, map[string]any{"codes": codesOfWaits})

	sayResult("echo", func() (any, error) { return echo(ctx, client) })
	sayResult("echo fails", func() (any, error) { return echoFails(ctx, client) })
	sayResult("concat", func() (any, error) { return concatenated(ctx, client) })
	sayResult("count", func() (any, error) { return counted(ctx, client) })
	return nil
}

func echo(ctx context.Context, client *ttrpc.Client) (any, error) {
	stream, err := client.NewStream(ctx, &bothWays, streaming, "Stream", nil)
	if err != nil {
		return nil, err
	}
	total := 0
	for i := range 200 {
		if err := stream.SendMsg(&anypb.Any{TypeUrl: "x", Value: make([]byte, i)}); err != nil {
			return nil, err
		}
		message := &anypb.Any{}
		if err := stream.RecvMsg(message); err != nil {
			return nil, err
		}
		total += len(message.Value)
	}
	if err := stream.CloseSend(); err != nil {
		return nil, err
	}
	if err := stream.RecvMsg(&anypb.Any{}); !errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("the end of the stream is %v", err)
	}
	return total, nil
}

func echoFails(ctx context.Context, client *ttrpc.Client) (any, error) {
	stream, err := client.NewStream(ctx, &bothWays, streaming, "Stream", nil)
	if err != nil {
		return nil, err
	}
	if err := stream.SendMsg(&anypb.Any{TypeUrl: "fail", Value: []byte("as asked")}); err != nil {
		return nil, err
	}
	return nil, stream.RecvMsg(&anypb.Any{})
}

func concatenated(ctx context.Context, client *ttrpc.Client) (any, error) {
	stream, err := client.NewStream(ctx, &ttrpc.StreamDesc{StreamingClient: true}, "interop.Streams", "Concat", nil)
	if err != nil {
		return nil, err
	}
	for _, part := range []string{"one ", "two ", "", "three"} {
		if err := stream.SendMsg(&anypb.Any{Value: []byte(part)}); err != nil {
			return nil, err
		}
	}
	if err := stream.CloseSend(); err != nil {
		return nil, err
	}
	all := &anypb.Any{}
	err = stream.RecvMsg(all)
	return string(all.Value), err
}

func counted(ctx context.Context, client *ttrpc.Client) (any, error) {
	desc := &ttrpc.StreamDesc{StreamingServer: true}
	stream, err := client.NewStream(ctx, desc, "interop.Streams", "Count", &anypb.Any{Value: []byte("abc")})
	if err != nil {
		return nil, err
	}
	text := ""
	for {
		message := &anypb.Any{}
		if err := stream.RecvMsg(message); errors.Is(err, io.EOF) {
			return text, nil
		} else if err != nil {
			return nil, err
		}
		text += string(message.Value)
	}
}

func say(what string, err error, result any) {
	s, _ := status.FromError(err)
	code := s.Code()
	if errors.Is(err, context.DeadlineExceeded) {
		code = codes.DeadlineExceeded
	}
	line, _ := json.Marshal(map[string]any{"call": what, "code": code, "message": s.Message(), "result": result})
	fmt.Println(string(line))
}

func sayResult(what string, run func() (any, error)) {
	result, err := run()
	say(what, err, result)
}
